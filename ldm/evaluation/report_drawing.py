"""Which pictures a report draws, and from what: prompts of held-out scenes or captions, a folder a scale."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from ldm.data.sample import Source
from ldm.data.scenes import ScenesConfig
from ldm.data.share import Share
from ldm.evaluation.drawing import PipelineDrawer
from ldm.evaluation.report_data import ReportData, Told, told_samples, told_scenes
from ldm.evaluation.report_pictures import PictureFolder
from ldm.evaluation.scenes import SceneScore, score_each
from ldm.pipeline import LatentDiffusionPipeline


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """How pictures are drawn."""

    count: int
    steps: int
    guidance: float | Mapping[str, float]
    scheduler: str | None
    """None: ddim, for a flow model euler."""
    batch: int
    seed: int
    sweep: tuple[float, ...] = ()
    """Guidance scales to compare."""
    sweep_count: int = 64
    """Pictures at each of them, at most `count`."""


@dataclass(frozen=True)
class Drawn:
    """Pictures on disk with what they were told."""

    told: Sequence[Told]
    folder: PictureFolder

    def picture(self, number: int) -> Image.Image:
        """Picture `number`, from 0."""
        return self.folder.picture(self.told[number])

    def scores(self, config: ScenesConfig) -> list[SceneScore]:
        """What the exact scorer finds in those that should show a scene."""
        told = [one for one in self.told if one.scene is not None]
        scenes = [one.scene for one in told if one.scene is not None]
        return score_each([self.folder.picture(one) for one in told], scenes, config, progress=True)


def told_for(pipeline: LatentDiffusionPipeline, data: ReportData, source: Source, count: int, seed: int) -> list[Told]:
    """What to draw: prompts of held-out combinations of scenes, else the captions of the data."""
    if data.vocabulary is not None:
        return told_scenes(data.vocabulary, count, seed)
    return told_samples(pipeline, source, data.config, count, seed)


def draw_all(
    pipeline: LatentDiffusionPipeline,
    told: Sequence[Told],
    drawing: Drawing,
    side: int,
    folder: Path,
    share: Share,
    model: str,
) -> dict[str, Drawn]:
    """The pictures of the report under "" and those of the sweep under their scales.

    `model` is a hash of its weights. Each scale has a folder below `folder`, claimed with its settings; a scale of the
    sweep that the report itself has costs nothing more.
    """
    scheduler = scheduler_for(pipeline, drawing.scheduler)
    wanted: list[tuple[str, float | Mapping[str, float], int]] = [("", drawing.guidance, len(told))]
    wanted += [(f"{scale:g}", scale, drawing.sweep_count) for scale in drawing.sweep]
    found = {}
    for name, guidance, count in wanted:
        drawer = PipelineDrawer(pipeline, drawing.steps, guidance, scheduler, drawing.batch, side)
        dtype = str(pipeline.dtype).removeprefix("torch.")
        settings: dict[str, Any] = {"model": model, "steps": drawing.steps, "guidance": guidance}
        settings |= {"scheduler": scheduler, "size": side, "dtype": dtype}
        pictures = PictureFolder(folder / f"guidance-{_scale_name(guidance)}")
        if share.rank == 0:
            pictures.claim(settings)
        share.wait()
        pictures.draw(told[:count], drawer.batch, drawing.batch, share, settings)
        found[name] = Drawn(told[:count], pictures)
    return found


def scheduler_for(pipeline: LatentDiffusionPipeline, name: str | None) -> str:
    """The scheduler called `name`, by default one that runs this model's noise."""
    return name or ("euler" if pipeline.is_flow else "ddim")


def _scale_name(guidance: float | Mapping[str, float]) -> str:
    if isinstance(guidance, Mapping):
        return ",".join(f"{name}={scale:g}" for name, scale in guidance.items())
    return f"{guidance:g}"

"""The report of a diffusion model: every section for which there is what it needs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from autoencoder.model import Autoencoder
from ldm.data.sample import Source
from ldm.errors import UserError
from ldm.evaluation.alignment import clip_score
from ldm.evaluation.extractors import ExtractorConfig
from ldm.evaluation.features import extract_features
from ldm.evaluation.image_metrics import measure_images
from ldm.evaluation.measurement import Measurement
from ldm.evaluation.report import Section, attempt
from ldm.evaluation.report_alignment import alignment_section
from ldm.evaluation.report_copying import copying_section, search_copies
from ldm.evaluation.report_data import ReportData, condition_batches, prompts_of
from ldm.evaluation.report_drawing import Drawn
from ldm.evaluation.report_eyes import Eyes, References, in_fp32, open_eyes
from ldm.evaluation.report_images import image_section, samples_section
from ldm.evaluation.report_likelihood import likelihood_section
from ldm.evaluation.report_reconstruction import reconstruction_section
from ldm.evaluation.report_scenes import combinations_section, flag_of, scene_figures, scenes_section
from ldm.evaluation.report_sweep import SweepPoint, sweep_section
from ldm.evaluation.scenes import SceneScore
from ldm.pipeline import LatentDiffusionPipeline

SHOWN = 32
"""Pictures on the page."""
SWEEP_REPLICATES = 50
BATCH = 32


@dataclass(frozen=True, kw_only=True)
class Measuring:
    """What is measured, and on how many images at most."""

    extractors: tuple[ExtractorConfig, ...]
    seed: int = 0
    reference: int = 10_000
    """Images compared with."""
    training_images: int = 10_000
    """Training images that copies are looked for in."""
    reconstructed: int = 128
    """Images that the autoencoder is measured on."""
    likelihood: int = 0
    """Images whose bits per dimension are measured; 0 = none."""
    lpips_weights: str | None = None


@dataclass(frozen=True)
class Measured:
    """A model with its pictures, the data, and what both are seen through."""

    pipeline: LatentDiffusionPipeline
    data: ReportData
    source: Source
    drawn: Mapping[str, Drawn]
    measuring: Measuring
    autoencoder: Autoencoder
    eyes: Eyes
    references: References
    scores: list[SceneScore] = field(default_factory=list)
    """Of the main pictures, where the data are scenes."""
    trained_scores: list[SceneScore] = field(default_factory=list)
    """Of pictures of combinations that training showed, where they were asked for."""

    @property
    def main(self) -> Drawn:
        """The pictures of the report itself, not of its sweep."""
        return self.drawn[""]

    @property
    def side(self) -> int:
        """Of all pictures, in pixels."""
        return self.data.config.resolution

    def batches(self, drawn: Drawn | None = None) -> Iterator[Tensor]:
        """Pictures as images [B, 3, H, W] in [-1, 1], by default the main ones."""
        drawn = drawn or self.main
        return drawn.folder.batches(drawn.told, BATCH)


def prepare(
    pipeline: LatentDiffusionPipeline,
    data: ReportData,
    source: Source,
    drawn: Mapping[str, Drawn],
    measuring: Measuring,
    cache: Path,
    trained: Drawn | None = None,
) -> Measured:
    """Open the extractors and, for scenes, score the pictures. `cache` is the folder for statistics of references.

    `trained` are pictures of combinations that training showed, to compare with.
    """
    autoencoder = in_fp32(pipeline.vae)
    side, scenes = data.config.resolution, data.vocabulary
    eyes = open_eyes(measuring.extractors, side, autoencoder, scenes, pipeline.device)
    references = References(eyes, data, source, measuring.reference, cache)
    scores = drawn[""].scores(scenes) if scenes is not None else []
    trained_scores = trained.scores(scenes) if scenes is not None and trained is not None else []
    return Measured(pipeline, data, source, drawn, measuring, autoencoder, eyes, references, scores, trained_scores)


def model_sections(made: Measured) -> list[Section]:
    """Every section but training's."""
    sections = [_samples(made)]
    if made.scores:
        sections.append(scenes_section(made.scores, made.side))
    if made.trained_scores:
        sections.append(combinations_section(made.scores, made.trained_scores, made.side))
    sections += [
        attempt(f"image_metrics_{name}", _through(extractor.name), lambda name=name: _images(made, name))  # type: ignore[misc]
        for name, extractor in made.eyes.opened.items()
    ]
    sections += [
        Section(name=f"image_metrics_{name}", title=_through(name), missing=line)
        for name, line in made.eyes.missing.items()
    ]
    further: list[tuple[str, str, Callable[[Measured], Section]]] = [
        ("alignment", "Pictures and prompts", _alignment),
        ("guidance_sweep", "Guidance sweep", _sweep),
        ("copying", "Copies of training images", _copying),
        ("reconstruction", "The autoencoder", _reconstruction),
        ("likelihood", "Likelihood", _likelihood),
    ]
    wanted = {"guidance_sweep": len(made.drawn) > 1, "likelihood": made.measuring.likelihood > 0}
    sections += [
        attempt(name, title, lambda make=make: make(made))  # type: ignore[misc]
        for name, title, make in further
        if wanted.get(name, True)
    ]
    return sections


def _through(name: str) -> str:
    return f"Against real images, through {name}"


def _samples(made: Measured) -> Section:
    told = made.main.told
    count = min(SHOWN, len(told))
    flags = [flag_of(score) for score in made.scores[:count]] or [""] * count
    return samples_section([made.main.picture(i) for i in range(count)], prompts_of(told[:count]), flags, len(told))


def _images(made: Measured, name: str) -> Section:
    reference = made.references.through(name)
    return image_section(made.eyes.opened[name], made.batches(), reference, name, made.measuring.seed)


def _alignment(made: Measured) -> Section:
    clip, prompts = made.eyes.clip, [one.prompt for one in made.main.told]
    if clip is None:
        raise UserError(
            "CLIP score: found no CLIP model; put open_clip_model.safetensors of ViT-B-32, say, into any folder and "
            "name it: --extractor openclip:ViT-B-32=FOLDER"
        )
    if not any(prompts):
        raise UserError("CLIP score: found no prompts, as the model takes no text; it has nothing to compare with")
    return alignment_section(clip, made.batches(), prompts, made.main.picture, made.measuring.seed)


def _sweep(made: Measured) -> Section:
    """FID at every scale through the first extractor, and agreement with the prompt by the best judge there is."""
    points = [SweepPoint(float(scale), _sweep_figures(made, drawn)) for scale, drawn in made.drawn.items() if scale]
    agreement = next((name for name in points[0].figures if name != "fid"), None)
    return sweep_section(points, agreement)


def _sweep_figures(made: Measured, drawn: Drawn) -> dict[str, Measurement]:
    name, extractor = made.eyes.first
    seed, scenes, clip = made.measuring.seed, made.data.vocabulary, made.eyes.clip
    found = extract_features(extractor, made.batches(drawn), "samples")
    against = made.references.through(name)
    figures = {"fid": measure_images(found, against, seed=seed, replicates=SWEEP_REPLICATES)[0]}
    if scenes is not None:
        figures["everything"] = scene_figures(drawn.scores(scenes), made.side)[-1]
    elif clip is not None:
        prompts = [one.prompt for one in drawn.told]
        figures["clip_score"] = clip_score(clip, made.batches(drawn), prompts, seed=seed).measurement
    return figures


def _copying(made: Measured) -> Section:
    found = search_copies(
        made.eyes.first[1],
        made.batches(),
        made.data,
        autoencoder=made.autoencoder,
        most=made.measuring.training_images,
        seed=made.measuring.seed,
    )
    return copying_section(found, made.main.picture, made.side)


def _reconstruction(made: Measured) -> Section:
    measuring = made.measuring
    return reconstruction_section(
        made.autoencoder,
        made.data,
        made.source,
        measuring.reconstructed,
        made.eyes.opened,
        measuring.lpips_weights,
        measuring.seed,
    )


def _likelihood(made: Measured) -> Section:
    measuring = made.measuring
    batches = condition_batches(made.pipeline, made.source, made.data.config, measuring.likelihood, BATCH)
    return likelihood_section(made.pipeline, batches, made.data.name, made.side, measuring.seed)

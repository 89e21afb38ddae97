"""A pipeline as the measurements draw with it: many pictures, in batches, with a progress bar."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from ldm.canvas import InpaintingOptions
from ldm.data.sample import UNKNOWN_CLASS
from ldm.evaluation.report_data import Told
from ldm.pipeline import WHOLE_PICTURE, LatentDiffusionPipeline


@dataclass(frozen=True)
class PipelineDrawer:
    """Draws one picture for each seed with fixed settings; a `Drawer` of `ldm.evaluation.conditions`."""

    pipeline: LatentDiffusionPipeline
    num_inference_steps: int
    guidance_scale: float | Mapping[str, float]
    scheduler: str
    batch_size: int
    side: int | None = None
    """Pixels; None is the model's own size."""
    inpainting: InpaintingOptions = WHOLE_PICTURE
    """How masks are used."""

    def __call__(
        self,
        *,
        prompt: Sequence[str],
        semantic: Sequence[Image.Image | None] | None = None,
        images: Sequence[Image.Image] | None = None,
        masks: Sequence[Image.Image] | None = None,
        labels: Sequence[int] | None = None,
        seeds: Sequence[int],
    ) -> list[Image.Image]:
        """Pictures in the order of the seeds; None is a condition that is absent."""
        given: dict[str, Any] = {
            "semantic_map": None if semantic is None else [self._map(one) for one in semantic],
            "image": images,
            "mask_image": masks,
            "label": labels,
        }
        drawn: list[Image.Image] = []
        told = "+".join(["prompt", *(name for name, value in given.items() if value is not None)])
        with tqdm(total=len(seeds), desc=f"drawing from {told}", unit="image") as progress:
            for first in range(0, len(seeds), self.batch_size):
                part = slice(first, first + self.batch_size)
                conditions = {name: None if value is None else list(value[part]) for name, value in given.items()}
                drawn += self._draw(list(prompt[part]), list(seeds[part]), conditions)
                progress.update(len(seeds[part]))
        return drawn

    def batch(self, told: Sequence[Told]) -> list[Image.Image]:
        """The pictures of one batch, all told the same conditions."""
        conditions: dict[str, Any] = {}
        if any(one.label is not None for one in told):
            conditions["label"] = [one.label for one in told]
        if any(one.semantic is not None for one in told):
            conditions["semantic_map"] = [self._map(one.semantic) for one in told]
        return self._draw([one.prompt for one in told], [one.seed for one in told], conditions)

    def _draw(self, prompts: list[str], seeds: list[int], conditions: Mapping[str, Any]) -> list[Image.Image]:
        guidance_scale = self.guidance_scale
        if isinstance(guidance_scale, Mapping):  # the scales of what is absent here have nothing to act on
            names = {"semantic": "semantic_map", "inpainting": "mask_image", "label": "label"}
            present = {"text": any(prompts), **{name: conditions.get(key) for name, key in names.items()}}
            guidance_scale = {name: scale for name, scale in guidance_scale.items() if present[name]}
        return self.pipeline(
            prompts,
            num_inference_steps=self.num_inference_steps,
            guidance_scale=guidance_scale,
            scheduler=self.scheduler,
            seed=seeds,
            height=self.side,
            width=self.side,
            inpainting=self.inpainting,
            **conditions,
        ).images

    def _map(self, given: Image.Image | None) -> Image.Image:
        if given is not None:
            return given
        height, width = self.pipeline.default_size
        return Image.fromarray(np.full((height, width), UNKNOWN_CLASS, dtype=np.uint8))

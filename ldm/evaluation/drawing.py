"""A pipeline as the measurements draw with it: many pictures, in batches, with a progress bar."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from ldm.data.sample import UNKNOWN_CLASS
from ldm.pipeline import LatentDiffusionPipeline


@dataclass(frozen=True)
class PipelineDrawer:
    """Draws one picture for each seed with fixed settings; a `Drawer` of `ldm.evaluation.conditions`."""

    pipeline: LatentDiffusionPipeline
    num_inference_steps: int
    guidance_scale: float | Mapping[str, float]
    scheduler: str
    batch_size: int

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
        guidance_scale = self.guidance_scale
        if isinstance(guidance_scale, Mapping):  # the scales of what is absent here have nothing to act on
            present = {"text": any(prompt), "semantic": semantic, "inpainting": masks, "label": labels}
            guidance_scale = {name: scale for name, scale in guidance_scale.items() if present[name]}
        drawn: list[Image.Image] = []
        told = "+".join(["prompt", *(name for name, value in given.items() if value is not None)])
        with tqdm(total=len(seeds), desc=f"drawing from {told}", unit="image") as progress:
            for first in range(0, len(seeds), self.batch_size):
                part = slice(first, first + self.batch_size)
                conditions: dict[str, Any] = {
                    name: None if value is None else list(value[part]) for name, value in given.items()
                }
                drawn += self.pipeline(
                    list(prompt[part]),
                    num_inference_steps=self.num_inference_steps,
                    guidance_scale=guidance_scale,
                    scheduler=self.scheduler,
                    seed=list(seeds[part]),
                    **conditions,
                ).images
                progress.update(len(seeds[part]))
        return drawn

    def _map(self, given: Image.Image | None) -> Image.Image:
        if given is not None:
            return given
        height, width = self.pipeline.default_size
        return Image.fromarray(np.full((height, width), UNKNOWN_CLASS, dtype=np.uint8))

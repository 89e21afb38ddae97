"""Pictures drawn while a model trains: from fixed prompts and seeds, a row for each way of telling what to draw."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from PIL import Image

from ldm.data.sample import Batch
from ldm.noise import NoiseConfig
from ldm.picture import colour_map, grid, mask_picture, to_pil
from ldm.pipeline import LatentDiffusionPipeline
from ldm.sampling import noise_config_of


@dataclass(frozen=True, kw_only=True)
class PreviewConfig:
    """Pictures drawn while training, from fixed prompts and seeds, and the validation loss."""

    prompts: tuple[str, ...] = ()  # empty: `count` samples of the validation data, with their maps and masks
    count: int = 8
    num_inference_steps: int = 25
    guidance_scale: float = 4.0
    scheduler: str | None = None  # null: ddim, for a flow model euler
    loss_images: int = 64  # validation images whose loss is measured at fixed noise and timesteps; 0 = none

    def __post_init__(self) -> None:
        for name, least in (("count", 1), ("num_inference_steps", 1), ("loss_images", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: found {getattr(self, name)}; allowed is {least} or more; raise it")

    def scheduler_for(self, noise: NoiseConfig) -> str:
        """The name of the scheduler to draw with."""
        return self.scheduler or ("euler" if noise.prediction == "flow" else "ddim")


def draw_preview(pipeline: LatentDiffusionPipeline, config: PreviewConfig, batch: Batch, seed: int) -> Image.Image:
    """A grid with a column for each sample of `batch`: from the prompt (and label), the map, and around a mask.

    Rows of conditions that the model has not are left out. Every picture of a column is drawn from the same seed.
    """
    common: dict[str, Any] = {
        "num_inference_steps": config.num_inference_steps,
        "guidance_scale": config.guidance_scale,
        "scheduler": config.scheduler_for(noise_config_of(pipeline.noise_scheduler)),
        "seed": seed,
    }
    if "label" in pipeline.conditions and batch.labels is not None:
        common["label"] = [None if label < 0 else label for label in batch.labels.tolist()]
    prompts = list(batch.captions) if pipeline.text_encoder is not None else [""] * len(batch)
    rows = [(list(pipeline(prompts, **common).images), prompts)]
    if "semantic" in pipeline.conditions and batch.semantic is not None:
        maps = list(batch.semantic.cpu())
        rows.append(([colour_map(part) for part in maps], ["map"] * len(batch)))
        rows.append((list(pipeline(prompts, semantic_map=maps, **common).images), ["from map and prompt"] * len(batch)))
    if "inpainting" in pipeline.conditions and batch.images is not None and batch.masks is not None:
        images, masks = to_pil(batch.images), [mask_picture(part) for part in batch.masks]
        holes = [Image.composite(Image.new("RGB", i.size, "grey"), i, m) for i, m in zip(images, masks, strict=True)]
        rows.append((holes, ["masked"] * len(batch)))
        drawn = pipeline(prompts, image=images, mask_image=masks, **common).images
        rows.append((list(drawn), ["inpainted"] * len(batch)))
    pictures = [picture for images, _ in rows for picture in images]
    captions = [caption for _, captions in rows for caption in captions]
    return grid(pictures, captions=captions, columns=len(batch))

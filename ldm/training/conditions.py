"""The conditions of a training: which there are, and what each step tells the U-Net of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields

import torch
from torch import Tensor

from conditioning.conditions import choose, dropped
from conditioning.encoders import ConditionEncoders, ConditionInputs
from conditioning.inpainting import InpaintingConfig, mask_to_latents, masked_image
from conditioning.label import LabelConfig
from conditioning.semantic import SemanticConfig
from conditioning.text import TextConfig
from ldm.data.loader import Wanted
from ldm.data.sample import UNKNOWN_CLASS, UNKNOWN_LABEL, Batch
from ldm.growing import SpatialLayout
from ldm.randomness import uniform_for_each


@dataclass(frozen=True, kw_only=True)
class ConditionsConfig:
    """What the U-Net is told besides the noisy latents and the timestep; null is a condition that it does not take.

    Each has its own `dropout`, the share of samples that go without it, drawn independently of the others: that is what
    lets each be left out, or be given a guidance scale of its own, when the model draws.
    """

    text: TextConfig = field(default_factory=TextConfig)
    semantic: SemanticConfig | None = None
    inpainting: InpaintingConfig | None = None
    label: LabelConfig | None = None

    @property
    def layout(self) -> SpatialLayout:
        """The U-Net's input channels beside the noisy latents."""
        return SpatialLayout(self.inpainting is not None, self.semantic.channels if self.semantic else 0)

    def dropouts(self) -> dict[str, float]:
        """The dropout rate of every condition that there is."""
        parts = {part.name: getattr(self, part.name) for part in fields(self)}
        if self.text.encoder == "none":
            del parts["text"]
        return {name: config.dropout for name, config in parts.items() if config is not None}


def wanted_of(config: ConditionsConfig, encoders: ConditionEncoders) -> Wanted:
    """What the loader has to bring for these conditions."""
    return Wanted(
        masks=config.inpainting,
        semantic_classes=len(encoders.semantic.classes) if encoders.semantic else None,
        label_classes=len(encoders.label.classes) if encoders.label else None,
    )


def condition_inputs(
    encoders: ConditionEncoders,
    batch: Batch,
    encode_latents: Callable[[Tensor], Tensor],
    losing: dict[str, Tensor],
) -> ConditionInputs:
    """What the step tells of a batch that is on the device already.

    `losing` holds for each condition which samples go without it, bool [B] on the CPU. `encode_latents` takes the
    masked images [B, 3, H, W] in [-1, 1] to latents [B, C, h, w] as the U-Net sees them.
    """
    tokens = mask = masked_latents = semantic = labels = None
    if encoders.text is not None:
        # On the CPU, where the tokeniser works: a dropped caption is the empty one, as at generation without a prompt.
        lost = losing["text"].tolist()
        tokens = encoders.text.tokenize(["" if gone else text for text, gone in zip(batch.captions, lost, strict=True)])
    if "inpainting" in losing:
        if batch.masks is None or batch.images is None:
            raise TypeError("training on inpainting needs images and masks in the batch")
        mask, masked_latents = _inpainting_inputs(batch.images, batch.masks, losing["inpainting"], encode_latents)
    if "semantic" in losing:
        if batch.semantic is None:
            raise TypeError("training on semantic maps needs maps in the batch")
        unknown = torch.full_like(batch.semantic[:1], UNKNOWN_CLASS)
        semantic = choose(~losing["semantic"], batch.semantic, unknown)  # [B, H, W]
    if "label" in losing:
        if batch.labels is None:
            raise TypeError("training on labels needs labels in the batch")
        labels = choose(~losing["label"], batch.labels, torch.full_like(batch.labels[:1], UNKNOWN_LABEL))  # [B]
    return ConditionInputs(tokens, mask, masked_latents, semantic, labels)


def _inpainting_inputs(
    images: Tensor, masks: Tensor, lost: Tensor, encode_latents: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Masks [B, 1, h, w] and masked-image latents [B, C, h, w]; where the condition is `lost` the hole is everything.

    `lost` is bool [B] on the CPU. Those samples share one grey picture, which is encoded once: at 512 px encoding takes
    about half as long as the U-Net's step.
    """
    # Found on the CPU and copied without waiting; an index on the CPU would be copied by waiting for the device.
    kept = (~lost).nonzero()[:, 0].to(images.device, non_blocking=True)
    masked_latents = encode_latents(torch.zeros_like(images[:1])).repeat(len(images), 1, 1, 1)
    pixel_masks = torch.ones_like(masks)  # [B, 1, H, W]
    if len(kept):
        pixel_masks[kept] = masks[kept]
        masked_latents[kept] = encode_latents(masked_image(images[kept], masks[kept]))
    return mask_to_latents(pixel_masks, *masked_latents.shape[-2:]), masked_latents


def draw_losing(dropouts: dict[str, float], batch: Batch, seed: int, step: int) -> dict[str, Tensor]:
    """Which samples lose which condition, bool [B] each: a function of (seed, step, position), one draw a condition."""
    return {
        name: dropped(rate, uniform_for_each(batch.positions, seed, f"dropout/{name}", step))
        for name, rate in dropouts.items()
    }

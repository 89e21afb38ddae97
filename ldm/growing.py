"""A trained U-Net takes on new conditions and, at first, draws exactly what it drew before.

New input channels start with zero weights (as in Stable Diffusion inpainting), so they add nothing to the first
layer until training moves them; a new class embedding starts at zero and adds nothing to the time embedding.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from ldm.errors import UserError
from ldm.unet import class_embedding_width_of


@dataclass(frozen=True)
class SpatialLayout:
    """Which condition channels follow the noisy latents, in DESIGN.md's order: mask, masked-image latents, semantic.

    `semantic_channels` is the width of the semantic embedding, 0 for a network that takes no map.
    """

    inpainting: bool
    semantic_channels: int

    def __post_init__(self) -> None:
        if self.semantic_channels < 0:
            raise UserError(
                f"semantic_channels: found {self.semantic_channels}; allowed is 0 (no semantic map) or more; 8 is usual"
            )

    def channels(self, latent_channels: int) -> int:
        """How many channels follow the `latent_channels` of the noisy latents."""
        return sum(self.sections(latent_channels)[1:])

    def sections(self, latent_channels: int) -> tuple[int, int, int]:
        """The widths of what the input is made of: noisy latents, mask with masked-image latents, semantic."""
        return latent_channels, 1 + latent_channels if self.inpainting else 0, self.semantic_channels


def grow(
    unet: UNet2DConditionModel, *, old: SpatialLayout, new: SpatialLayout, class_embedding_width: int | None
) -> UNet2DConditionModel:
    """A copy of `unet` that also takes the conditions which `new` and `class_embedding_width` add; `unet` stays as is.

    `old` says what the network takes now; `class_embedding_width` is that of `Conditions.class_embedding` afterwards,
    None for a network without. Old weights are copied bit for bit, so for the same latents, timesteps and context the
    output is the old one, whatever the new conditions hold (to rounding: a wider first layer may sum in another
    order). The copy keeps device, floating type, memory format, gradient checkpointing, attention processors, mode and
    `requires_grad`; new weights get them from the layer they join. Its config is plain diffusers'. Gradients reach the
    new weights from the first step, and what feeds them (the semantic and label encoders) from the second.

    Raises UserError when `old` is not what the network takes, and when something would have to be taken away.
    """
    latent_channels = unet.config.out_channels
    _check_layouts(unet, old, new, latent_channels)
    _check_class_embedding(unet, class_embedding_width)
    grown = copy.deepcopy(unet)
    if new != old:
        _widen_input(grown, old.sections(latent_channels), new.sections(latent_channels))
    if class_embedding_width is not None and grown.class_embedding is None:
        _add_class_embedding(grown, class_embedding_width)
    return grown


def _widen_input(unet: UNet2DConditionModel, old: tuple[int, ...], new: tuple[int, ...]) -> None:
    """Give the first layer zero weights for every section that it lacks, between those that it has."""
    weight = unet.conv_in.weight.detach()  # [out, in, k, k]
    parts = [
        part if part.shape[1] == width else _zeros(part, width)
        for part, width in zip(weight.split(old, dim=1), new, strict=True)
    ]
    wide = torch.cat(parts, dim=1)
    if not weight.is_contiguous() and weight.is_contiguous(memory_format=torch.channels_last):
        wide = wide.contiguous(memory_format=torch.channels_last)
    # The layer itself stays, with its padding, hooks and bias.
    unet.conv_in.weight = nn.Parameter(wide, requires_grad=unet.conv_in.weight.requires_grad)
    unet.conv_in.in_channels = sum(new)
    unet.register_to_config(in_channels=sum(new))


def _zeros(part: Tensor, width: int) -> Tensor:
    return part.new_zeros(part.shape[0], width, *part.shape[2:])


def _add_class_embedding(unet: UNet2DConditionModel, width: int) -> None:
    last = unet.time_embedding.linear_2  # the class embedding is added to what this layer returns
    like = last.weight
    # On "meta" nothing is drawn: the caller's random numbers stay as they are.
    layer = nn.Linear(width, last.out_features, dtype=like.dtype, device="meta").to_empty(device=like.device)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    unet.class_embedding = layer.requires_grad_(like.requires_grad).train(unet.training)
    unet.register_to_config(class_embed_type="simple_projection", projection_class_embeddings_input_dim=width)


def _check_layouts(unet: UNet2DConditionModel, old: SpatialLayout, new: SpatialLayout, latent_channels: int) -> None:
    found, said = unet.config.in_channels, latent_channels + old.channels(latent_channels)
    if found != said:
        raise UserError(
            f"unet: found {found} input channels; its conditions ({_named(old)}) make {said} with {latent_channels} "
            "latent channels; name the conditions that it was trained with"
        )
    if type(unet.conv_in) is not nn.Conv2d:
        raise UserError(
            f"unet: found {type(unet.conv_in).__name__} as its first layer; allowed is a plain convolution; "
            "merge the adapters (LoRA) into the weights first"
        )
    if old.inpainting and not new.inpainting:
        raise UserError(
            "inpainting: found in the network and not among the new conditions; allowed is to add conditions, not to "
            "take them away; keep inpainting (a full mask means none)"
        )
    if old.semantic_channels not in (0, new.semantic_channels):
        raise UserError(
            f"semantic.channels: found {new.semantic_channels} for a network whose semantic maps have "
            f"{old.semantic_channels}; allowed is the same width; set it to {old.semantic_channels}"
        )


def _check_class_embedding(unet: UNet2DConditionModel, width: int | None) -> None:
    if width is not None and width < 1:
        raise UserError(f"label.width: found {width}; allowed is 1 or more; 128 is usual")
    config = unet.config
    if unet.class_embedding is None:
        if width is not None and config.addition_embed_type == "text_time":
            raise UserError(
                "unet: found a network with size and crop embeddings (SDXL); allowed is one without, since its config "
                "has no room for a class embedding as well; use a Stable Diffusion 1.x or 2.x network"
            )
        return
    if config.class_embed_type != "simple_projection":
        kind = config.class_embed_type or "index"
        raise UserError(
            f"unet: found a class embedding of type {kind}; allowed is none or simple_projection; use another network"
        )
    has = class_embedding_width_of(unet)
    if width != has:
        raise UserError(
            f"label.width: found {width or 'no labels'} for a network whose class embedding has width {has}; allowed "
            f"is the same width; keep the label condition, with width {has}"
        )


def _named(layout: SpatialLayout) -> str:
    names = ["inpainting"] if layout.inpainting else []
    names += [f"semantic with {layout.semantic_channels} channels"] if layout.semantic_channels else []
    return " and ".join(names) or "none spatial"

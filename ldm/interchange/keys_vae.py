"""The autoencoder's weights in the original layout: `first_stage_model.*` of CompVis' latent diffusion."""

from __future__ import annotations

import re
from collections.abc import Iterable

from ldm.interchange.keys import Place

PREFIX = "first_stage_model."
_MATRICES = {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_OUTER = re.compile(r"(quant_conv|post_quant_conv|(?:encoder|decoder)\.conv_(?:in|out|norm_out))\.(weight|bias)")
_LEVEL = re.compile(r"(encoder|decoder)\.(?:down|up)_blocks\.(\d+)\.resnets\.(\d+)\.(.+)")
_RESIZE = re.compile(r"(encoder|decoder)\.(?:down|up)_blocks\.(\d+)\.(downsample|upsample)rs\.0\.(.+)")
_MIDDLE = re.compile(r"(encoder|decoder)\.mid_block\.resnets\.(\d+)\.(.+)")
_ATTENTION = re.compile(r"(encoder|decoder)\.mid_block\.attentions\.0\.(group_norm|to_q|to_k|to_v|to_out\.0)\.(.+)")


def vae_places(names: Iterable[str], levels: int) -> dict[str, Place]:
    """The place of each weight of an AutoencoderKL; raises ValueError, naming it, for one that has none."""
    return {name: _place(name, levels) for name in names}


def _place(name: str, levels: int) -> Place:
    if found := _ATTENTION.fullmatch(name):
        layer = _MATRICES.get(found[2], "norm")
        is_conv = found[2] in _MATRICES and found[3] == "weight"
        return Place(f"{PREFIX}{found[1]}.mid.attn_1.{layer}.{found[3]}", is_conv=is_conv)
    return Place(PREFIX + _key(name, levels))


def _key(name: str, levels: int) -> str:
    if found := _OUTER.fullmatch(name):
        return f"{found[1].replace('conv_norm_out', 'norm_out')}.{found[2]}"
    if found := _MIDDLE.fullmatch(name):
        return f"{found[1]}.mid.block_{int(found[2]) + 1}.{_in_resnet(found[3])}"
    if found := _LEVEL.fullmatch(name):
        return f"{_level(found[1], int(found[2]), levels)}.block.{found[3]}.{_in_resnet(found[4])}"
    if found := _RESIZE.fullmatch(name):
        return f"{_level(found[1], int(found[2]), levels)}.{found[3]}.{found[4]}"
    raise ValueError(f"vae: found weight {name}, which the original layout has no place for")


def _level(side: str, level: int, levels: int) -> str:
    """Both sides count from the pixels there; diffusers' decoder counts from the latents."""
    return f"encoder.down.{level}" if side == "encoder" else f"decoder.up.{levels - 1 - level}"


def _in_resnet(name: str) -> str:
    return name.replace("conv_shortcut", "nin_shortcut", 1)

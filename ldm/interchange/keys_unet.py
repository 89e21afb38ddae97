"""The U-Net's weights in the original layout: `model.diffusion_model.*` of CompVis' latent diffusion."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from ldm.interchange.keys import Place

PREFIX = "model.diffusion_model."
_OUTER = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "mid_block.attentions.0": "middle_block.1",
}
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_LEVEL = re.compile(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)")
_MIDDLE = re.compile(r"mid_block\.resnets\.(\d+)\.(.+)")


def unet_places(names: Iterable[str], layers_per_block: int, up_attention: Sequence[bool]) -> dict[str, Place]:
    """The place of each weight of a UNet2DConditionModel; raises ValueError, naming it, for one that has none.

    `up_attention` tells which up blocks have attention: their upsampling convolution lies behind it.
    """
    return {name: Place(PREFIX + _key(name, layers_per_block, up_attention)) for name in names}


def _key(name: str, layers: int, up_attention: Sequence[bool]) -> str:
    for ours, theirs in _OUTER.items():
        if name.startswith(f"{ours}."):
            return theirs + name[len(ours) :]
    if found := _MIDDLE.fullmatch(name):
        return f"middle_block.{2 * int(found[1])}.{_in_resnet(found[2])}"
    found = _LEVEL.fullmatch(name)
    if found is None:
        raise ValueError(f"unet: found weight {name}, which the original layout has no place for")
    side, level, kind, index, rest = found[1], int(found[2]), found[3], int(found[4]), found[5]
    if kind == "downsamplers":
        return f"input_blocks.{(level + 1) * (layers + 1)}.0.{rest.replace('conv', 'op', 1)}"
    if kind == "upsamplers":
        return f"output_blocks.{level * (layers + 1) + layers}.{2 if up_attention[level] else 1}.{rest}"
    block = level * (layers + 1) + index
    where = f"input_blocks.{1 + block}" if side == "down" else f"output_blocks.{block}"
    return f"{where}.0.{_in_resnet(rest)}" if kind == "resnets" else f"{where}.1.{rest}"


def _in_resnet(name: str) -> str:
    layer, _, kind = name.partition(".")
    if layer not in _RESNET:
        raise ValueError(f"unet: found weight {name} of a residual block, which the original layout has no place for")
    return f"{_RESNET[layer]}.{kind}"

"""The configuration of a model's three networks, by the keys and shapes of a checkpoint in the original layout.

Keys are given without the network's prefix. Every function raises ValueError, one line, for what is no such part.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ldm.interchange.hints import Hints
from ldm.interchange.keys import Shape
from ldm.interchange.keys_text import BLOCKS, TextLayout

STANDARD_SCALING_FACTOR = 0.18215
_HEAD_WIDTH, _HEADS, _NORM_GROUPS = 64, 8, 32


def unet_config(shapes: Mapping[str, Shape], hints: Hints) -> dict[str, Any]:
    """The arguments of UNet2DConditionModel, without `sample_size`."""
    levels = _levels(shapes)
    widths = [level[0][0] for level in levels]
    depths = [level[0][1] for level in levels]
    middle = _depth(shapes, "middle_block.1.")
    if depths[-1] not in (0, middle):
        raise ValueError(
            f"unet: found {middle} transformer blocks in the middle and {depths[-1]} on the last level; "
            "allowed is as many"
        )
    to_keys = [key for key in shapes if key.endswith("attn2.to_k.weight") and len(shapes[key]) == 2]
    projections = [key for key in shapes if key.endswith(".proj_in.weight")]
    if not middle or not to_keys or not projections:
        raise ValueError(
            "unet: found no cross-attention in the middle; allowed is a text-to-image U-Net; check the file"
        )
    linear = len(shapes[projections[0]]) == 2
    attends = [bool(depth) for depth in depths]
    return {
        "in_channels": _dimension(shapes, "input_blocks.0.0.weight", 1),
        "out_channels": _dimension(shapes, "out.2.weight", 0),
        "block_out_channels": tuple(widths),
        "layers_per_block": len(levels[0]),
        "down_block_types": tuple("CrossAttnDownBlock2D" if flag else "DownBlock2D" for flag in attends),
        "up_block_types": tuple("CrossAttnUpBlock2D" if flag else "UpBlock2D" for flag in reversed(attends)),
        "transformer_layers_per_block": tuple(max(depth, 1) for depth in [*depths[:-1], middle]),
        "cross_attention_dim": shapes[to_keys[0]][1],
        "use_linear_projection": linear,
        # diffusers' attention_head_dim is the NUMBER of heads here.
        "attention_head_dim": _heads(widths, [*attends[:-1], True], linear, hints),
        "norm_num_groups": _groups("norm_groups", hints.norm_groups, widths),
    }


def vae_config(shapes: Mapping[str, Shape], hints: Hints, scaling_factor: float | None) -> dict[str, Any]:
    """The arguments of AutoencoderKL; `scaling_factor` is the file's own, if it has one."""
    if any(key.startswith("quantize.") for key in shapes):
        raise ValueError("vae: found a VQ autoencoder; allowed is a KL autoencoder in this layout; use a folder")
    levels = _count(shapes, "encoder.down.")
    if not levels:
        raise ValueError("vae: found no encoder; allowed is a whole autoencoder; check the file")
    if inside := [key for key in shapes if ".down." in key and ".attn." in key]:
        raise ValueError(f"vae: found attention on a level ({inside[0]}); allowed is in the middle only; use a folder")
    widths = [
        _width(shapes, f"encoder.down.{level}.block.0.", ("conv1.weight", "conv2.weight")) for level in range(levels)
    ]
    factor = hints.scaling_factor or scaling_factor or STANDARD_SCALING_FACTOR
    return {
        "in_channels": _dimension(shapes, "encoder.conv_in.weight", 1),
        "out_channels": _dimension(shapes, "decoder.conv_out.weight", 0),
        "latent_channels": _dimension(shapes, "decoder.conv_in.weight", 1),
        "block_out_channels": tuple(widths),
        "layers_per_block": _count(shapes, "encoder.down.0.block."),
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "mid_block_add_attention": any(key.startswith("encoder.mid.attn_1.") for key in shapes),
        "use_quant_conv": any(key.startswith("quant_conv.") for key in shapes),
        "use_post_quant_conv": any(key.startswith("post_quant_conv.") for key in shapes),
        "norm_num_groups": _groups("vae_norm_groups", hints.vae_norm_groups, widths),
        "scaling_factor": factor,
        "sample_size": 512,
    }


def text_config(shapes: Mapping[str, Shape], hints: Hints, layout: TextLayout) -> dict[str, Any]:
    """The arguments of CLIPTextConfig; the pad token is Stable Diffusion's, `!` with open_clip's layout."""
    first = f"{BLOCKS}0.mlp.c_fc." if layout == "openclip" else "encoder.layers.0.mlp.fc1."
    embedding, positions = "token_embedding.weight", "positional_embedding"
    if layout == "transformers":
        embedding, positions = f"embeddings.{embedding}", "embeddings.position_embedding.weight"
    vocabulary, width = _dimension(shapes, embedding, 0), _dimension(shapes, embedding, 1)
    heads = hints.text_heads or max(1, width // _HEAD_WIDTH)
    if width % heads:
        raise ValueError(f"text_heads: found {heads} for {width} channels; allowed is a divisor; give it as a hint")
    blocks = _count(shapes, "encoder.layers.") if layout == "transformers" else _used_blocks(shapes, width, hints)
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": _width(shapes, first, ("weight", "bias")),
        "num_hidden_layers": blocks,
        "num_attention_heads": heads,
        "max_position_embeddings": _dimension(shapes, positions, 0),
        "projection_dim": width,
        "hidden_act": hints.text_activation or ("gelu" if layout == "openclip" else "quick_gelu"),
        "pad_token_id": 0 if layout == "openclip" else vocabulary - 1,
        "bos_token_id": vocabulary - 2,
        "eos_token_id": vocabulary - 1,
    }


def _used_blocks(shapes: Mapping[str, Shape], width: int, hints: Hints) -> int:
    """The blocks that make the context: Stable Diffusion 2 holds one more, which nothing reads."""
    there = _count(shapes, BLOCKS)
    last_is_left_out = (width, there) == (1024, 23)
    used = hints.text_blocks or (there if last_is_left_out else there - 1)
    if not 1 <= used <= there:
        raise ValueError(f"text_blocks: found {used} with {there} blocks in the file; allowed is 1 to {there}")
    return used


def _levels(shapes: Mapping[str, Shape]) -> list[list[tuple[int, int]]]:
    """(channels, depth of its transformer) of the residual blocks on each level on the way down."""
    inside = [key.split(".", 4)[1:4] for key in shapes if key.startswith("input_blocks.")]
    blocks = {words[0] for words in inside if words[1:2] == ["0"]}
    halving = {words[0] for words in inside if words[1:] == ["0", "op"]}
    levels: list[list[tuple[int, int]]] = [[]]
    index = 1
    while str(index) in blocks:
        prefix = f"input_blocks.{index}."
        if str(index) in halving:
            levels.append([])
        else:
            names = ("0.in_layers.2.weight", "0.out_layers.3.weight", "0.out_layers.0.weight")
            levels[-1].append((_width(shapes, prefix, names), _depth(shapes, f"{prefix}1.")))
        index += 1
    counts = {len(level) for level in levels}
    if len(counts) != 1 or 0 in counts:
        found = ", ".join(str(len(level)) for level in levels)
        raise ValueError(f"unet: found {found} residual blocks on its levels; allowed is one number for all; check it")
    if any(len(set(level)) != 1 for level in levels):
        raise ValueError("unet: found blocks of differing width or attention on a level; allowed is alike; check it")
    return levels


def _depth(shapes: Mapping[str, Shape], prefix: str) -> int:
    return _count(shapes, f"{prefix}transformer_blocks.")


def _count(shapes: Mapping[str, Shape], prefix: str) -> int:
    """How many numbers from 0 on without a gap follow `prefix` among the keys."""
    found = {key[len(prefix) :].split(".", 1)[0] for key in shapes if key.startswith(prefix)}
    count = 0
    while str(count) in found:
        count += 1
    return count


def _width(shapes: Mapping[str, Shape], prefix: str, names: Sequence[str]) -> int:
    """Output channels by the first of several weights that is there, so that one missing key is named as missing."""
    for name in names:
        if prefix + name in shapes:
            return _dimension(shapes, prefix + name, 0)
    raise ValueError(f"found no {prefix}{names[0]}; allowed is a whole model; check the file")


def _dimension(shapes: Mapping[str, Shape], key: str, dimension: int) -> int:
    shape = shapes.get(key, ())
    if dimension >= len(shape):
        found = f"of shape {list(shape)}" if key in shapes else "missing"
        raise ValueError(f"found {key} {found}; allowed is a whole model; check the file")
    return shape[dimension]


def _heads(widths: Sequence[int], attends: Sequence[bool], linear: bool, hints: Hints) -> tuple[int, ...]:
    heads = hints.heads or tuple(max(1, width // _HEAD_WIDTH) if linear else _HEADS for width in widths)
    if len(heads) != len(widths):
        raise ValueError(f"heads: found {len(heads)} numbers; allowed is one for each of the {len(widths)} levels")
    for number, width, flag in zip(heads, widths, attends, strict=True):
        if flag and width % number:
            raise ValueError(f"heads: found {number} for {width} channels; allowed is a divisor; give heads as a hint")
    return heads


def _groups(name: str, hint: int | None, widths: Sequence[int]) -> int:
    groups = hint or _NORM_GROUPS
    wrong = [width for width in widths if width % groups]
    if wrong:
        raise ValueError(f"{name}: found {groups} for {wrong[0]} channels; allowed is a divisor; give {name} as a hint")
    return groups

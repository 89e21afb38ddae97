"""The text tower's weights in the original layouts: `cond_stage_model.*` of Stable Diffusion 1 and of 2.

Stable Diffusion 1 keeps transformers' own names. Stable Diffusion 2 keeps open_clip's, with query, key and value in one
matrix, and with a last block that nothing reads: the context is the penultimate state after the final norm.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Literal

from ldm.interchange.keys import Place

TextLayout = Literal["transformers", "openclip"]
PREFIX = "cond_stage_model."
TRANSFORMERS_PREFIXES = ("cond_stage_model.transformer.text_model.", "cond_stage_model.transformer.")
"""Stable Diffusion 1's prefix, and the one that files have whose writer used a newer transformers."""
OPENCLIP_PREFIX = "cond_stage_model.model."
BLOCKS = "transformer.resblocks."  # behind the prefix
_OUTER = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
}
_LAYERS = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
_BLOCK = re.compile(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)")
_QUERY_KEY_VALUE = {"self_attn.q_proj": 0, "self_attn.k_proj": 1, "self_attn.v_proj": 2}


def text_places(names: Iterable[str], layout: TextLayout, prefix: str) -> dict[str, Place]:
    """The place of each weight of a CLIPTextModel; raises ValueError, naming it, for one that has none."""
    if layout == "transformers":
        return {name: Place(prefix + name) for name in names}
    ordered = sorted(names, key=_order)
    return {name: _openclip_place(name, prefix) for name in ordered}


def _openclip_place(name: str, prefix: str) -> Place:
    if name in _OUTER:
        return Place(prefix + _OUTER[name])
    found = _BLOCK.fullmatch(name)
    if found is None or found[2] not in (_LAYERS | _QUERY_KEY_VALUE):
        raise ValueError(f"text_encoder: found weight {name}, which open_clip's layout has no place for")
    block = f"{prefix}{BLOCKS}{found[1]}"
    if found[2] in _QUERY_KEY_VALUE:
        return Place(f"{block}.attn.in_proj_{found[3]}", (_QUERY_KEY_VALUE[found[2]], 3))
    return Place(f"{block}.{_LAYERS[found[2]]}.{found[3]}")


def _order(name: str) -> tuple[str, str, int]:
    """Query, key and value of one kind follow one another, in this order, as they are stacked."""
    found = _BLOCK.fullmatch(name)
    if found is None or found[2] not in _QUERY_KEY_VALUE:
        return name, "", 0
    return f"encoder.layers.{found[1]}.self_attn.in_proj", found[3], _QUERY_KEY_VALUE[found[2]]

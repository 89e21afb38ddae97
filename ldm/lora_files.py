"""LoRAs: what they are in memory, and how they are written to safetensors files, in diffusers' (peft) or kohya's names.

diffusers: `unet.<module>.lora_A.weight`, with rank and alpha as JSON in the header. kohya, which A1111 and ComfyUI
read: `lora_unet_<module with _ for .>.lora_down.weight`, with one `.alpha` tensor a module. Both name the text model's
modules with a `text_model.` that transformers >= 5.6 has no more in memory; here they go without.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from safetensors.torch import save_file
from torch import Tensor

from ldm.errors import UserError
from ldm.files import whole_file

LoraKind = Literal["diffusers", "kohya"]
TEXT_PREFIX = "text_model."
KOHYA_PREFIXES = {"unet": ("lora_unet_",), "text_encoder": ("lora_te_", "lora_te1_")}
"""What kohya's keys of a network begin with; the first is written, all are read."""


@dataclass(frozen=True, eq=False)
class LoraLayer:
    """What one layer learns: its weight W becomes W + (alpha / rank) up @ down.

    `down` is [rank, in] and `up` [out, rank]; of a convolution [rank, in, k, k] and [out, rank, 1, 1].
    """

    down: Tensor
    up: Tensor
    alpha: float
    key: str = ""
    """The name of `down` in the file that it was read from."""

    @property
    def rank(self) -> int:
        """The rank of the change."""
        return self.down.shape[0]


@dataclass(frozen=True, kw_only=True)
class LoraInfo:
    """What a reader shows of a file; empty fields are not written."""

    title: str = ""
    base_model: str = ""
    trigger_words: tuple[str, ...] = ()
    architecture: str = ""  # ModelSpec's name, such as stable-diffusion-v1/lora
    license: str = ""


@dataclass(frozen=True, eq=False)
class Lora:
    """A LoRA in memory: its layers by module name of diffusers' U-Net and of transformers' CLIPTextModel >= 5.6."""

    unet: Mapping[str, LoraLayer]
    text_encoder: Mapping[str, LoraLayer] = field(default_factory=dict)
    info: LoraInfo = LoraInfo()

    def networks(self) -> dict[str, Mapping[str, LoraLayer]]:
        """The layers by network, in diffusers' words; networks without any are left out."""
        both = {"unet": self.unet, "text_encoder": self.text_encoder}
        return {network: layers for network, layers in both.items() if layers}


def save_lora(path: str | Path, lora: Lora, *, kind: LoraKind = "diffusers", dtype: torch.dtype | None = None) -> None:
    """Write `lora` to a .safetensors file, whole or not at all; `dtype` None keeps the tensors' own.

    Readers other than diffusers ignore the alpha of a `diffusers` file: give them `kohya`. Raises UserError when the
    file cannot be written.
    """
    path = Path(path)
    if path.suffix != ".safetensors" or kind not in get_args(LoraKind):
        raise UserError(f"{path} ({kind}): allowed is a name that ends in .safetensors and diffusers or kohya; mend it")
    if not lora.networks():
        raise UserError(f"{path}: found a LoRA without layers; allowed is one or more; add a target")
    tensors = _kohya_tensors(lora) if kind == "kohya" else _diffusers_tensors(lora)
    if dtype is not None:
        tensors = {key: tensor if key.endswith(".alpha") else tensor.to(dtype) for key, tensor in tensors.items()}
    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    header = _header_of(lora.info) | (_kohya_header(lora) if kind == "kohya" else _diffusers_header(lora))
    with whole_file(path) as partial:
        save_file(tensors, partial, metadata=header)


def _stem(network: str, module: str) -> str:
    return TEXT_PREFIX + module if network == "text_encoder" else module


def _diffusers_tensors(lora: Lora) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for network, layers in lora.networks().items():
        for module, layer in layers.items():
            stem = f"{network}.{_stem(network, module)}"
            tensors |= {f"{stem}.lora_A.weight": layer.down, f"{stem}.lora_B.weight": layer.up}
    return tensors


def _kohya_tensors(lora: Lora) -> dict[str, Tensor]:
    """Not diffusers' `convert_state_dict_to_kohya`: it writes the rank for alpha, and names the text model as SDXL."""
    tensors: dict[str, Tensor] = {}
    for network, layers in lora.networks().items():
        for module, layer in layers.items():
            stem = KOHYA_PREFIXES[network][0] + _stem(network, module).replace(".", "_")
            alpha = torch.tensor(layer.alpha, dtype=torch.float32)
            tensors |= {f"{stem}.lora_down.weight": layer.down, f"{stem}.lora_up.weight": layer.up}
            tensors[f"{stem}.alpha"] = alpha
    return tensors


def _diffusers_header(lora: Lora) -> dict[str, str]:
    said: dict[str, Any] = {}
    for network, layers in lora.networks().items():
        said |= {f"{network}.{key}": value for key, value in peft_settings(layers).items()}
    return {LORA_ADAPTER_METADATA_KEY: json.dumps(said, indent=2, sort_keys=True)}


def peft_settings(layers: Mapping[str, LoraLayer]) -> dict[str, Any]:
    """The arguments of peft's LoraConfig for these layers; the usual rank and alpha, then the modules that differ.

    peft matches a pattern with the end of a module's name, so it holds with and without `text_model.` too.
    """
    rank = Counter(layer.rank for layer in layers.values()).most_common(1)[0][0]
    alpha = Counter(layer.alpha for layer in layers.values()).most_common(1)[0][0]
    return {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {re.escape(name): x.rank for name, x in layers.items() if x.rank != rank},
        "alpha_pattern": {re.escape(name): x.alpha for name, x in layers.items() if x.alpha != alpha},
        "target_modules": sorted(layers),
    }


def _kohya_header(lora: Lora) -> dict[str, str]:
    settings = peft_settings({f"{n}.{name}": x for n, layers in lora.networks().items() for name, x in layers.items()})
    return {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(settings["r"]),
        "ss_network_alpha": str(settings["lora_alpha"]),
    }


INFO_KEYS = {
    "title": "modelspec.title",
    "architecture": "modelspec.architecture",
    "trigger_words": "modelspec.trigger_phrase",
    "license": "modelspec.license",
    "base_model": "base_model",
}
"""ModelSpec 1.0.1 (github.com/Stability-AI/ModelSpec) where it has a name for it."""


def _header_of(info: LoraInfo) -> dict[str, str]:
    values = {**vars(info), "trigger_words": ", ".join(info.trigger_words)}
    written = {INFO_KEYS[name]: value for name, value in values.items() if value}
    needed = {"sai_model_spec": "1.0.1", "implementation": "https://github.com/huggingface/diffusers"}
    return {"format": "pt"} | {f"modelspec.{key}": value for key, value in needed.items()} | written

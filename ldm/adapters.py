"""LoRA (arXiv 2106.09685): small matrices beside frozen layers; added, trained, loaded and read out again.

The layers are peft's, put into diffusers' U-Net and transformers' CLIP text model (`TextEncoder.model`) alike;
`ldm.adapter_layers` weighs, merges and removes them, `ldm.lora_files` saves them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from ldm.adapter_layers import check_known, check_name, inject, lora_layers, plain_layers, set_weight
from ldm.errors import UserError
from ldm.lora_files import Lora, LoraInfo, LoraLayer, peft_settings
from ldm.lora_reading import read_lora

_ATTENTION = r"to_[qkv]|to_out\.0|[qkv]_proj|out_proj"
_FEEDFORWARD = r"ff\.net\.0\.proj|ff\.net\.2|fc1|fc2|proj_in|proj_out"
PRESETS = {
    "attention": rf".*\.({_ATTENTION})",
    "attention+feedforward": rf".*\.({_ATTENTION}|{_FEEDFORWARD})",
    "all-linear+conv": r"(down_blocks|mid_block|up_blocks|encoder)\..*",
}
"""Names of targets -> the names of modules, in the U-Net and the text model."""


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Which layers get a change of which rank.

    `target` holds presets and ends of module names (`conv_in`, `attn2.to_k`). The presets: `attention`, the
    projections; `attention+feedforward`, all of the transformers, as kohya's LoRA; `all-linear+conv`, the residual
    blocks and resamplers too, as LoCon, though not the first, last and time layers. The change is scaled by
    alpha / rank; alpha None is the rank. `dropout` of the input of the change draws from torch's global generator.
    """

    rank: int = 16
    alpha: float | None = None
    target: tuple[str, ...] = ("attention",)
    text_encoder: bool = False
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank: found {self.rank}; allowed is 1 or more; 16 is usual")
        if self.alpha is not None and self.alpha <= 0:
            raise ValueError(f"alpha: found {self.alpha}; allowed is above 0; leave it out for the rank")
        if not self.target or not all(self.target):
            raise ValueError(
                f"target: found {list(self.target)}; allowed are {', '.join(PRESETS)} and ends of module names; "
                "name one or more"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout: found {self.dropout}; allowed is 0 up to below 1; 0 is usual")


def add_lora(
    unet: UNet2DConditionModel, text_model: nn.Module | None, config: LoraConfig, *, name: str = "default"
) -> tuple[str, ...]:
    """Freeze the networks and give them a new LoRA to train; returns the names of its parameters.

    They begin with `unet.` and `text_encoder.`, are float32, and take their values from torch's global seed; at first
    nothing that is computed changes. LoRAs that are loaded already stay in force, frozen. Raises UserError when a
    target fits no layer.
    """
    if config.text_encoder and text_model is None:
        raise UserError("lora.text_encoder: found true for a model without text; allowed is false; set it")
    networks = {"unet": unet} | ({"text_encoder": text_model} if config.text_encoder and text_model else {})
    check_name(name, unet, text_model)
    chosen = {network: _targets(module, config) for network, module in networks.items()}
    _check_targets(networks, config, chosen)
    for module in (unet, text_model):
        if module is not None:
            module.requires_grad_(False)
    alpha = config.rank if config.alpha is None else config.alpha
    for network, names in chosen.items():
        settings = {"r": config.rank, "lora_alpha": alpha, "lora_dropout": config.dropout, "target_modules": names}
        inject(networks[network], name, settings, trained=True)
    return tuple(
        f"{network}.{key}" for network in networks for key, p in networks[network].named_parameters() if p.requires_grad
    )


def load_lora(
    unet: UNet2DConditionModel,
    text_model: nn.Module | None,
    path: str | Path,
    weight: float = 1.0,
    *,
    name: str | None = None,
) -> str:
    """Read a diffusers or kohya file and put it into force, beside others, times `weight`; returns its name.

    `name` None is the file's. Raises UserError for a file that does not fit; the networks are then as before.
    """
    text_layers = {} if text_model is None else plain_layers(text_model)
    lora = read_lora(path, plain_layers(unet), text_layers)
    for layers, modules in ((lora.unet, plain_layers(unet)), (lora.text_encoder, text_layers)):
        for module, layer in layers.items():
            _check_shapes(path, layer, modules[module])
    name = Path(path).stem.replace(".", "_") if name is None else name
    attach_lora(unet, text_model, lora, weight, name=name)
    return name


def attach_lora(
    unet: UNet2DConditionModel, text_model: nn.Module | None, lora: Lora, weight: float = 1.0, *, name: str
) -> None:
    """Put a LoRA that fits into force, frozen, in the type of the layers that it changes. Draws no random numbers."""
    check_name(name, unet, text_model)
    for network, layers in ((unet, lora.unet), (text_model, lora.text_encoder)):
        if network is None or not layers:
            continue
        inject(network, name, peft_settings(layers), trained=False)
        for module, layer in lora_layers(network).items():
            if module in layers:
                like = layer.get_base_layer().weight
                layer.lora_A[name].weight = _frozen(layers[module].down, like)
                layer.lora_B[name].weight = _frozen(layers[module].up, like)
        set_weight(network, name=name, weight=weight)


def lora_state(
    unet: UNet2DConditionModel, text_model: nn.Module | None, *, name: str = "default", info: LoraInfo | None = None
) -> Lora:
    """A copy, on the CPU, of the LoRA called `name` as it is now; the weight it was loaded with is no part of it."""
    check_known(name, unet, text_model)
    unet_layers, text_layers = (_state(network, name) for network in (unet, text_model))
    return Lora(unet_layers, text_layers, info or LoraInfo())


def _targets(network: nn.Module, config: LoraConfig) -> list[str]:
    patterns = [PRESETS.get(target, rf"(.*\.)?{re.escape(target)}") for target in config.target]
    return [name for name in plain_layers(network) if any(re.fullmatch(pattern, name) for pattern in patterns)]


def _check_targets(networks: Mapping[str, nn.Module], config: LoraConfig, chosen: Mapping[str, list[str]]) -> None:
    for target in config.target:
        one = LoraConfig(target=(target,))
        if not any(_targets(network, one) for network in networks.values()):
            raise UserError(
                f"lora.target: found {target}, which no layer's name ends in; allowed are {', '.join(PRESETS)} "
                f"and ends such as {next(iter(plain_layers(networks['unet'])))}; mend it"
            )
    empty = [network for network, names in chosen.items() if not names]
    if empty:
        raise UserError(f"lora.target: found no layer of the {empty[0]} in {list(config.target)}; add attention")


def _state(network: nn.Module | None, name: str) -> dict[str, LoraLayer]:
    return {
        module: LoraLayer(_copy(layer.lora_A[name].weight), _copy(layer.lora_B[name].weight), layer.lora_alpha[name])
        for module, layer in lora_layers(network).items()
        if name in layer.lora_A
    }


def _copy(weight: Tensor) -> Tensor:
    return weight.detach().cpu().clone().contiguous()


def _frozen(tensor: Tensor, like: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.to(like.device, like.dtype, copy=True), requires_grad=False)


def _check_shapes(path: str | Path, layer: LoraLayer, module: nn.Linear | nn.Conv2d) -> None:
    weight = module.weight  # [out, in] or [out, in / groups, k, k]
    ones = [1] * (weight.ndim - 2)
    wanted = [[layer.rank, *weight.shape[1:]], [weight.shape[0], layer.rank, *ones]]
    found = [list(layer.down.shape), list(layer.up.shape)]
    if found != wanted:
        raise UserError(
            f"{path}: found {layer.key} of shape {found[0]} with {found[1]}; this model's layer takes {wanted[0]} with "
            f"{wanted[1]}; use a LoRA made for this model"
        )

"""peft's LoRA layers inside a network: put in, weighed, merged, taken out.

Every function takes networks that may be None (a model without text) and ones without LoRAs.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import peft
import torch
from peft.functional import cast_adapter_dtype
from peft.tuners.lora.layer import LoraLayer as PeftLayer
from torch import Tensor, nn

from ldm.errors import UserError


def lora_layers(network: nn.Module | None) -> dict[str, Any]:
    """The layers of the network that carry LoRAs, by module name."""
    modules = () if network is None else network.named_modules()
    return {name: module for name, module in modules if isinstance(module, PeftLayer)}


def plain_layers(network: nn.Module) -> dict[str, nn.Linear | nn.Conv2d]:
    """The network's own linear layers and convolutions by module name, whether they carry LoRAs or not."""
    carrying = lora_layers(network)
    inside = tuple(f"{name}." for name in carrying)
    return {
        name: layer
        for name, module in network.named_modules()
        if not name.startswith(inside)
        and isinstance(layer := carrying[name].get_base_layer() if name in carrying else module, nn.Linear | nn.Conv2d)
    }


def adapter_names(*networks: nn.Module | None) -> tuple[str, ...]:
    """The names of the LoRAs in the networks, in the order in which they came."""
    names = (name for network in networks for layer in lora_layers(network).values() for name in layer.lora_A)
    return tuple(dict.fromkeys(names))


def check_name(name: str, *networks: nn.Module | None) -> None:
    """Raise UserError unless a new LoRA can have this name."""
    if name in adapter_names(*networks) or "." in name or not name:
        raise UserError(f"LoRA name: found {name!r}, taken or with a dot; allowed is a new one; give another")


def check_known(name: str, *networks: nn.Module | None) -> None:
    """Raise UserError unless one of the networks carries a LoRA of this name."""
    names = adapter_names(*networks)
    if name not in names:
        raise UserError(f"LoRA name: found {name!r}; there are: {', '.join(names) or 'none'}; choose one of these")


def inject(network: nn.Module, name: str, settings: dict[str, Any], *, trained: bool) -> None:
    """Have peft wrap the layers that its `settings` name. Other parameters keep their `requires_grad`.

    Trained ones are float32 and take their values from torch's global seed; untrained ones are left without values.
    """
    _check_unmerged([network])
    flags = _gradient_flags(network)
    # One expression for exactly these modules: of a list peft also takes what merely ends in one.
    exactly = "|".join(re.escape(module) for module in settings["target_modules"])
    config = peft.LoraConfig(**{**settings, "target_modules": f"({exactly})"}, inference_mode=not trained)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # several are what we want
        peft.inject_adapter_in_model(config, network, adapter_name=name, low_cpu_mem_usage=not trained)
    if trained:
        cast_adapter_dtype(network, name)
    new = {id(p): trained for layer in lora_layers(network).values() for p in _parameters(layer, name)}
    _activate_all(network, flags | new)


def set_weight(*networks: nn.Module | None, name: str, weight: float) -> None:
    """Make the LoRA called `name` count `weight` times its change; 0 switches it off. Not while merged."""
    _check_unmerged(networks)
    check_known(name, *networks)
    for network in networks:
        for layer in lora_layers(network).values():
            layer.set_scale(name, weight)


@torch.no_grad()
def merge(*networks: nn.Module | None) -> None:
    """Add the changes of all LoRAs to the weights, so that drawing costs nothing more."""
    for network in networks:
        for layer in lora_layers(network).values():
            if not layer.merged:
                layer.merge()


@torch.no_grad()
def unmerge(*networks: nn.Module | None) -> None:
    """Undo `merge`; the weights are the old ones up to a rounding in their type."""
    for network in networks:
        for layer in lora_layers(network).values():
            if layer.merged:
                layer.unmerge()


def remove(*networks: nn.Module | None, name: str | None = None) -> None:
    """Take out one LoRA, or all, and leave plain layers where none remains. Not while merged.

    To keep the changes for good, `bake` instead.
    """
    _check_unmerged(networks)
    if name is not None:
        check_known(name, *networks)
    for network in networks:
        flags = _gradient_flags(network)
        for module, layer in lora_layers(network).items():
            kept = [key for key in layer.lora_A if name not in (None, key)]
            if kept:
                if len(kept) < len(layer.lora_A):
                    layer.delete_adapter(name)
            else:
                _replace(network, module, layer.get_base_layer())
        _forget_configs(network)
        _activate_all(network, flags)


def bake(*networks: nn.Module | None) -> None:
    """Make the changes of all LoRAs part of the weights for good: plain networks that compute the same."""
    merge(*networks)
    for network in networks:
        for module, layer in lora_layers(network).items():
            _replace(network, module, layer.get_base_layer())
        _forget_configs(network)


@contextmanager
def plain_networks(*networks: nn.Module | None, merged: bool) -> Iterator[None]:
    """Inside, the networks are plain ones with their own names, fit to be saved; `merged` with the changes added.

    Afterwards all is as before, bit for bit. Must not be left with the networks changed inside.
    """
    _check_unmerged(networks)
    found = [(network, module, layer) for network in networks for module, layer in lora_layers(network).items()]
    former = [layer.get_base_layer().weight.data for _, _, layer in found]
    try:
        for network, module, layer in found:
            base = layer.get_base_layer()
            if merged:
                base.weight.data = _merged_weight(layer)
            _replace(network, module, base)
        yield
    finally:
        for (network, module, layer), weight in zip(found, former, strict=True):
            layer.get_base_layer().weight.data = weight
            _replace(network, module, layer)


def _parameters(layer: Any, name: str) -> list[nn.Parameter]:
    return [part[name].weight for part in (layer.lora_A, layer.lora_B) if name in part]


def _activate_all(network: nn.Module | None, flags: Mapping[int, bool]) -> None:
    """Let every LoRA count; peft switches gradients on and off with that, so they are put back."""
    names = list(adapter_names(network))
    for layer in lora_layers(network).values():
        layer.set_adapter(names, inference_mode=True)
    for parameter in () if network is None else network.parameters():
        parameter.requires_grad_(flags[id(parameter)])


def _gradient_flags(network: nn.Module | None) -> dict[int, bool]:
    return {} if network is None else {id(parameter): parameter.requires_grad for parameter in network.parameters()}


def _check_unmerged(networks: Sequence[nn.Module | None]) -> None:
    if any(layer.merged for network in networks for layer in lora_layers(network).values()):
        raise ValueError("found merged LoRAs; allowed are unmerged ones; call unmerge first")


def _forget_configs(network: nn.Module | None) -> None:
    names = adapter_names(network)
    configs = getattr(network, "peft_config", {})
    for name in set(configs) - set(names):
        del configs[name]
    if network is not None and not names and hasattr(network, "peft_config"):
        del network.peft_config


def _replace(network: nn.Module | None, name: str, layer: nn.Module) -> None:
    if network is not None:
        parent, _, last = name.rpartition(".")
        setattr(network.get_submodule(parent), last, layer)


@torch.no_grad()
def _merged_weight(layer: Any) -> Tensor:
    weight = layer.get_base_layer().weight
    changes = [layer.get_delta_weight(name).float() for name in layer.lora_A]
    return sum(changes, weight.float()).to(weight.dtype)

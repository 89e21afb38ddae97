"""LoRA files are read: diffusers' names, the older ones too, and kohya's; safetensors only."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY, LORA_WEIGHT_NAME_SAFE
from diffusers.utils.state_dict_utils import (
    DIFFUSERS_OLD_TO_PEFT,
    DIFFUSERS_TO_PEFT,
    UNET_TO_DIFFUSERS,
    convert_state_dict,
)
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ldm.errors import UserError, user_input
from ldm.lora_files import INFO_KEYS, KOHYA_PREFIXES, TEXT_PREFIX, Lora, LoraInfo, LoraLayer

_KOHYA_PARTS = {"lora_down.weight": "down", "lora_up.weight": "up", "alpha": "alpha"}
_PEFT_PARTS = {"lora_A.weight": "down", "lora_B.weight": "up", "alpha": "alpha"}
_PEFT_KEY = re.compile(r"(?P<module>.+)\.(?P<part>lora_A\.weight|lora_B\.weight|alpha)")


RUN_FILE = "lora.safetensors"
"""What a run calls the LoRA that it made."""


def lora_file(path: str | Path) -> Path:
    """The file meant by `path`: it itself, that in the folder of a run, or in one that diffusers saved a LoRA in.

    Raises UserError when there is none.
    """
    path = Path(path)
    if not path.is_dir():
        return path
    for name in (RUN_FILE, LORA_WEIGHT_NAME_SAFE):
        if (path / name).is_file():
            return path / name
    raise UserError(f"{path}: found no {RUN_FILE} in it; allowed is a LoRA's file or the run that made one; check it")


def lora_name(file: Path) -> str:
    """What people call the LoRA in `file`: the name of its run, where that is what it lies in, else of the file."""
    return file.resolve().parent.name if file.name in (RUN_FILE, LORA_WEIGHT_NAME_SAFE) else file.stem


def read_lora(path: str | Path, unet_modules: Iterable[str], text_modules: Iterable[str] = ()) -> Lora:
    """Read a LoRA, from a file or a folder as in `lora_file`, in either naming, also diffusers' older ones.

    The module names of the model are needed since kohya's naming cannot be undone without them. Tensors keep their
    type; a module without alpha has alpha = rank. Raises UserError, naming the first key that does not belong, for
    another kind of file, a LoRA of another model, and what is no plain LoRA (DoRA, LoHa, LoKr, biases).
    """
    path = lora_file(path)
    tensors, header = _read(path)
    modules = {"unet": tuple(unet_modules), "text_encoder": tuple(text_modules)}
    if any(key.startswith(("lora_unet_", "lora_te")) for key in tensors):
        parts, alphas = _parts_of_kohya(path, tensors, modules), {}
    else:
        parts = _parts_of_diffusers(path, tensors, modules)
        alphas = _alphas_of_header(path, header)
    layers = {
        (network, module): _layer(path, network, module, found, alphas) for (network, module), found in parts.items()
    }
    if not layers:
        raise UserError(f"{path}: found no tensors; allowed is a LoRA; check the file")
    unet, text = (
        {module: layer for (of, module), layer in layers.items() if of == network} for network in KOHYA_PREFIXES
    )
    return Lora(unet, text, _info_of(header))


def checked_lora(path: str | Path) -> Path:
    """The file meant by `path`, as `lora_file`; raises UserError, before a model is read, unless it is whole."""
    path = lora_file(path)
    with _opened(path):
        return path


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with _opened(path) as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    if not path.is_file():
        raise UserError(f"{path}: no such file; give a LoRA in .safetensors form, or the folder of one")
    reason = f"{path}: found no safetensors file, the only form that is opened"
    with user_input(reason, OSError, SafetensorError), safe_open(path, framework="pt") as file:
        yield file


_Parts = dict[tuple[str, str], dict[str, tuple[str, Tensor]]]
"""(network, module) -> down, up, alpha -> the key in the file and its tensor."""


def _parts_of_kohya(path: Path, tensors: Mapping[str, Tensor], modules: Mapping[str, tuple[str, ...]]) -> _Parts:
    names = {
        f"{prefix}{infix}{module}".replace(".", "_"): (network, module)
        for network, prefixes in KOHYA_PREFIXES.items()
        for prefix in prefixes
        for infix in (("", TEXT_PREFIX) if network == "text_encoder" else ("",))
        for module in modules[network]
    }
    parts: _Parts = {}
    for key, tensor in tensors.items():
        stem, _, part = key.partition(".")
        if part not in _KOHYA_PARTS:
            raise _no_lora(path, key)
        if stem not in names:
            raise _other_model(path, key)
        parts.setdefault(names[stem], {})[_KOHYA_PARTS[part]] = key, tensor
    return parts


def _parts_of_diffusers(path: Path, tensors: Mapping[str, Tensor], modules: Mapping[str, tuple[str, ...]]) -> _Parts:
    parts: _Parts = {}
    for key, tensor in tensors.items():
        network, name = _network_of(key)
        match = _PEFT_KEY.fullmatch(_modern(network, name))
        if match is None:
            raise _no_lora(path, key)
        module = match["module"].removeprefix(TEXT_PREFIX) if network == "text_encoder" else match["module"]
        if module not in modules[network]:
            raise _other_model(path, key)
        parts.setdefault((network, module), {})[_PEFT_PARTS[match["part"]]] = key, tensor
    return parts


def _network_of(key: str) -> tuple[str, str]:
    """The network of a key, and the key within; `UNet2DConditionModel.save_lora_adapter` writes no prefix."""
    network, _, name = key.partition(".")
    return (network, name) if network in KOHYA_PREFIXES else ("unet", key)


def _modern(network: str, name: str) -> str:
    """A key in peft's words, whichever of diffusers' three namings it has."""
    mapping = UNET_TO_DIFFUSERS if network == "unet" else DIFFUSERS_OLD_TO_PEFT | DIFFUSERS_TO_PEFT
    return next(iter(convert_state_dict({name: None}, mapping)))


def _alphas_of_header(path: Path, header: Mapping[str, str]) -> dict[str, Any]:
    """What peft's LoraConfig said when the file was written: `unet.lora_alpha` and so on; empty if it says nothing."""
    with user_input(f"{path}: {LORA_ADAPTER_METADATA_KEY}", ValueError, RecursionError):
        said = json.loads(header.get(LORA_ADAPTER_METADATA_KEY) or "{}")
    if not isinstance(said, dict):
        raise UserError(f"{path}: found {LORA_ADAPTER_METADATA_KEY} that is no mapping; allowed is diffusers' own")
    return {key if _network_of(key)[1] != key else f"unet.{key}": value for key, value in said.items()}


def _layer(
    path: Path, network: str, module: str, parts: Mapping[str, tuple[str, Tensor]], said: Mapping[str, Any]
) -> LoraLayer:
    if "down" not in parts or "up" not in parts:
        key, _ = next(iter(parts.values()))
        raise UserError(f"{path}: found {key} without its other half; allowed is a whole LoRA; check the file")
    (key, down), (_, up) = parts["down"], parts["up"]
    rank = down.shape[0] if down.ndim in (2, 4) else 0
    if rank == 0 or up.ndim != down.ndim or up.shape[1] != rank or not down.is_floating_point():
        raise UserError(
            f"{path}: found {key} of shape {tuple(down.shape)} with {tuple(up.shape)}; "
            "allowed is [rank, in] with [out, rank]; check the file"
        )
    with user_input(f"{path}: alpha of {key}", ValueError, TypeError, RuntimeError):
        alpha = float(parts["alpha"][1]) if "alpha" in parts else _alpha_said(network, module, rank, said)
    return LoraLayer(down, up, alpha, key)


def _alpha_said(network: str, module: str, rank: int, said: Mapping[str, Any]) -> float:
    alpha = said.get(f"{network}.lora_alpha", rank)
    for pattern, value in dict(said.get(f"{network}.alpha_pattern") or {}).items():
        # peft takes regular expressions; diffusers writes names, and a stranger's expression is not to be run.
        name = pattern.removeprefix("^").replace("\\", "").removeprefix(TEXT_PREFIX)
        if not re.fullmatch(r"[\w.]+", name):
            raise ValueError(f"found the pattern {pattern}; allowed are names of modules; save the LoRA again")
        if f".{module}".endswith(f".{name}"):
            alpha = value
            break
    # Rank-stabilised LoRA divides by the root of the rank (arXiv 2312.03732).
    return float(alpha) * (rank**0.5 if said.get(f"{network}.use_rslora") else 1.0)


def _no_lora(path: Path, key: str) -> UserError:
    return UserError(
        f"{path}: found {key}, which no plain LoRA has; allowed is lora_A and lora_B, or lora_down, lora_up and alpha; "
        "give a LoRA (not a DoRA, LoHa, LoKr or whole model)"
    )


def _other_model(path: Path, key: str) -> UserError:
    return UserError(f"{path}: found {key}, a layer that this model has not; use a LoRA made for this model")


def _info_of(header: Mapping[str, str]) -> LoraInfo:
    found = {name: header.get(key, "") for name, key in INFO_KEYS.items()}
    words = tuple(word.strip() for word in found.pop("trigger_words").split(",") if word.strip())
    return LoraInfo(trigger_words=words, **found)

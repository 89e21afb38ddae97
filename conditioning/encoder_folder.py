"""A small encoder on disk: `config.json` and `model.safetensors` in a folder of its own."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


def write_encoder(folder: Path, module: nn.Module, config: Mapping[str, Any]) -> None:
    """Write `config` and the module's weights into `folder`, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"_class_name": type(module).__name__, **config}, indent=2, ensure_ascii=False)
    (folder / "config.json").write_text(text + "\n", encoding="utf-8")
    weights = {name: weight.contiguous() for name, weight in module.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def read_config(folder: Path, number: str) -> tuple[tuple[str, ...], int]:
    """The class names and the whole number called `number` of the `config.json` in `folder`.

    Raises FileNotFoundError without such a file and ValueError if it holds something else.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; a saved model has one; check the folder")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # also for bytes that are no UTF-8
        raise ValueError(f"{path}: found no JSON ({error}); save the model again") from error
    config = config if isinstance(config, dict) else {}
    classes, value = config.get("classes"), config.get(number)
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes) or type(value) is not int:
        raise ValueError(
            f"{path}: found classes {_short(classes)} and {number} {_short(value)}; allowed is a list of names "
            "and a whole number; save the model again"
        )
    return tuple(classes), value


def read_weights(folder: Path, module: nn.Module) -> None:
    """Put the weights of `folder`, in the type they were saved in, into `module`, which may be on the meta device.

    Raises FileNotFoundError without a `model.safetensors` and ValueError if it is broken or of another shape.
    """
    path = folder / "model.safetensors"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; a saved model has one; check the folder")
    try:
        # Copied: what safetensors returns may lie in the mapped file, which a later save overwrites.
        weights = {name: weight.clone() for name, weight in load_file(path).items()}
    except SafetensorError as error:
        raise ValueError(f"{path}: it is broken ({error}); save or copy the model again") from error
    found, needed = _shapes(weights), _shapes(module.state_dict())
    if found != needed:
        raise ValueError(f"{path}: found the weights {found}; config.json needs {needed}; save or copy the model again")
    module.load_state_dict(weights, assign=True)


def _shapes(weights: Mapping[str, Tensor]) -> dict[str, list[int]]:
    return {name: list(weight.shape) for name, weight in sorted(weights.items())}


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."

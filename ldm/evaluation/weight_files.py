"""Weights of foreign networks: found in a file or folder that the user names, read without running anything in them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch._weights_only_unpickler import UnpicklingError

from ldm.errors import UserError, user_input

_PICKLES = (".pth", ".pt", ".bin")
_PICKLE_ERRORS = (UnpicklingError, OSError, EOFError, RuntimeError, ValueError, TypeError, KeyError, AttributeError)


def find_weights(network: str, given: str | None, names: Sequence[str]) -> Path:
    """The file `given`, or the first of `names` in the folder `given`.

    Raises `UserError`, which says which file to put where, if there is none.
    """
    wanted = " or ".join(names)
    if given is None:
        raise UserError(
            f"{network}: found no weights; allowed is a local file {wanted}, or a download that you ask for; "
            "put the file into any folder and name it (weights), or allow the download (download)"
        )
    path = Path(given).expanduser()
    if path.is_dir():
        found = [path / name for name in names if (path / name).is_file()]
        if not found:
            raise UserError(f"{network}: found no {wanted} in {path}; put it there, or name another file (weights)")
        return found[0]
    if not path.is_file():
        raise UserError(f"{network}: found no file {path}; put {wanted} there, or name another place (weights)")
    return path


def read_weights(network: str, path: Path, *, allow_pickle: bool) -> dict[str, Tensor]:
    """The tensors of a safetensors file, or of a pickle where that is allowed (weights_only). Raises `UserError`."""
    if path.suffix == ".safetensors":
        with user_input(f"{network}: {path}", OSError, SafetensorError):
            return load_file(path)
    if path.suffix not in _PICKLES:
        raise UserError(f"{network}: found {path}; allowed is a .safetensors file; name another")
    if not allow_pickle:
        raise UserError(
            f"{network}: {path}: found a pickle; allowed is .safetensors; convert it, or allow pickles (allow_pickle)"
        )
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except _PICKLE_ERRORS as error:
        raise UserError(f"{network}: {path}: it is damaged, or holds more than tensors; fetch it again") from error
    if not isinstance(state, dict):
        raise UserError(f"{network}: {path}: found {type(state).__name__}; allowed is a dictionary of tensors")
    return state

"""A file of named tensors: shapes first, then one tensor at a time. Nothing in it is run, however it was made."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch._weights_only_unpickler import UnpicklingError

from ldm.errors import UserError, user_input
from ldm.interchange.keys import Shape
from ldm.pipeline_weights import refuse_pointer

_PICKLE_ERRORS = (
    *(UnpicklingError, RuntimeError, ValueError, TypeError, AttributeError),
    *(KeyError, IndexError, EOFError, OSError, zipfile.BadZipFile, NotImplementedError),
)
_MOST_TENSORS = 10_000  # Stable Diffusion has 1,100, twice that with its running averages


@dataclass(frozen=True)
class WeightFile:
    """What lies in a file.

    Attributes:
        shapes: of every tensor, by key.
        numbers: the keys whose tensors are floating point.
        read: the tensor of a key, on the CPU, in its own type.
        metadata: of a safetensors header; empty for others.
    """

    path: Path
    shapes: Mapping[str, Shape]
    numbers: frozenset[str]
    read: Callable[[str], Tensor]
    metadata: Mapping[str, str] = field(default_factory=dict)


@contextmanager
def open_weights(path: str | Path, *, allow_pickle: bool = False) -> Iterator[WeightFile]:
    """Open a safetensors file, or with `allow_pickle` a `.ckpt` / `.pt` that torch wrote, by what is in it.

    A pickle is read with `weights_only`, only in torch's zip format, and only if it holds no more than its own size.
    Raises UserError, one line, for what is missing, damaged or something else.
    """
    path = Path(path)
    refuse_pointer(path)
    with user_input(str(path), OSError), path.open("rb") as file:
        start = file.read(9)
    # A safetensors file begins with the length of its header, which may well look like the start of a pickle.
    if start[8:9] != b"{" and (start[:2] == b"PK" or start[:1] == b"\x80"):
        if not allow_pickle:
            raise UserError(
                f"{path}: found a pickle, which can carry a program; allowed is .safetensors; "
                "if you trust where it comes from, allow it with allow_pickle (ldm export --allow-pickle converts it)"
            )
        yield _torch_file(path)
        return
    with user_input(f"{path}: found no whole safetensors file", SafetensorError, OSError):
        opened = safe_open(path, "pt")
    with opened as file:
        slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 - it is no dict
        shapes = {key: tuple(piece.get_shape()) for key, piece in slices.items()}
        numbers = frozenset(key for key, piece in slices.items() if piece.get_dtype().startswith(("F", "BF")))
        _check_sizes(path, shapes)
        yield WeightFile(path, shapes, numbers, file.get_tensor, file.metadata() or {})


def _torch_file(path: Path) -> WeightFile:
    try:
        _check_archive(path)
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except _PICKLE_ERRORS as error:
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise UserError(
            f"{path}: found no checkpoint of tensors alone ({reason}); allowed is torch's zip format with nothing else "
            "in it; convert it to safetensors where it was made"
        ) from error
    tensors = _tensors(content.get("state_dict", content) if isinstance(content, dict) else {})
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    _check_sizes(path, shapes)
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    if size > path.stat().st_size:  # views that repeat one number make any size out of nothing
        raise UserError(f"{path}: found tensors of {size:,} bytes in a file of {path.stat().st_size:,}; not opened")
    numbers = frozenset(key for key, tensor in tensors.items() if tensor.is_floating_point())
    return WeightFile(path, shapes, numbers, tensors.__getitem__)


def _tensors(content: object) -> dict[str, Tensor]:
    """The plain tensors of a state dict: dense, and with memory behind them."""
    items = content.items() if isinstance(content, dict) else ()
    return {
        key: value
        for key, value in items
        if isinstance(key, str)
        and isinstance(value, Tensor)
        and value.device.type == "cpu"
        and value.layout == torch.strided
        and not value.is_quantized
    }


def _check_archive(path: Path) -> None:
    """Refuse what unpacks to more than the file: torch stores its records as they are."""
    with zipfile.ZipFile(path) as archive:  # a pickle of torch before 1.6 is no archive
        records = archive.infolist()
    if any(record.compress_type != zipfile.ZIP_STORED for record in records):
        raise ValueError("it has compressed records, which torch does not write")
    if sum(record.file_size for record in records) > path.stat().st_size:
        raise ValueError("its records are larger than the file")


def _check_sizes(path: Path, shapes: Mapping[str, Shape]) -> None:
    if len(shapes) > _MOST_TENSORS:
        raise UserError(f"{path}: found {len(shapes):,} tensors; allowed is {_MOST_TENSORS:,}; it is no such model")
    empty = [key for key, shape in shapes.items() if 0 in shape]
    if empty:  # no bytes stand behind its other dimensions, so they may be any number
        raise UserError(f"{path}: found {empty[0]} of shape {list(shapes[empty[0]])}; allowed is no empty tensor")

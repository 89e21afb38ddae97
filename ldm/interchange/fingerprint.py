"""A model's fingerprint: by it a run notices that the model it began from is another one now."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator
from pathlib import Path

from ldm.errors import UserError, user_input
from ldm.interchange.opening import model_folder
from ldm.pipeline_folder import HUB_FOLDERS

_SUFFIXES = (".safetensors", ".json", ".txt")
"""Of weights, configurations, and a tokenizer's merges."""
_SETTINGS = ("config.json", "scheduler_config.json", "model_index.json")
_SAMPLE, _PLACES, _WHOLE = 4096, 1024, 1 << 20
_LONGEST_HEADER = 100_000_000  # safetensors' own limit


def base_model_hash(path: str | Path) -> str:
    """16 hex digits that change with the model at `path`: a pipeline's folder, a part's, a run, a file, a hub id.

    Not every byte is read: of a safetensors file the header and, of each tensor, its beginning, middle and end; of
    other large files 1,024 places. So it takes a fraction of a second, and training changes it, since that changes a
    tensor everywhere or nowhere. Where the model lies does not count, nor what diffusers and transformers note about
    themselves in a config. Raises UserError for a path that is no model.
    """
    digest = hashlib.sha256()
    for name, file in _files(path):
        with user_input(str(path), OSError):
            digest.update(f"{name}\n".encode())
            for piece in _pieces(file):
                digest.update(hashlib.sha256(piece).digest())
    return digest.hexdigest()[:16]


def check_base_model(path: str | Path, expected: str, *, what: str = "model") -> None:
    """Raise UserError, naming it, unless the model at `path` still has the hash `expected`; `what` is its key."""
    found = base_model_hash(path)
    if found != expected:
        raise UserError(
            f"{what}: found another model at {path} than the one this run began from ({found}, not {expected}); "
            "allowed is the same; put it back, or start a new run (out=...)"
        )


def _files(path: str | Path) -> list[tuple[str, Path]]:
    """(name within the model, file) of all that makes the model, in a fixed order."""
    path = Path(path)
    if path.is_file():
        return [("", path)]
    if (path / "config.json").is_file() and not (path / "model_index.json").is_file():
        return _in_folder(path, "")
    folder = model_folder(path)
    parts = [found for part in HUB_FOLDERS for found in _in_folder(folder / part, f"{part}/")]
    return [("model_index.json", folder / "model_index.json"), *parts]


def _in_folder(folder: Path, prefix: str) -> list[tuple[str, Path]]:
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    return [(f"{prefix}{file.name}", file) for file in files if file.suffix in _SUFFIXES]


def _pieces(path: Path) -> Iterator[bytes]:
    if path.name in _SETTINGS:
        yield _told(path.read_bytes())
        return
    size = path.stat().st_size
    yield str(size).encode()
    if size <= _WHOLE:
        yield path.read_bytes()
        return
    with path.open("rb", buffering=0) as file:  # no reading ahead: what lies between is not wanted
        header, starts = _places(file, size)
        yield header
        for start in starts:
            file.seek(start)
            yield file.read(_SAMPLE)


def _places(file: io.FileIO, size: int) -> tuple[bytes, list[int]]:
    """A safetensors header and three places of each of its tensors; places all over where there is none."""
    length = int.from_bytes(file.read(8), "little")
    header = file.read(length) if length <= min(_LONGEST_HEADER, size - 8) else b""
    try:
        tensors = json.loads(header)
        ends = [value["data_offsets"] for name, value in tensors.items() if name != "__metadata__"]
        first = 8 + length
        places = [first + start + (end - start) * half // 2 for start, end in ends for half in (0, 1)]
        places += [max(first, first + end - _SAMPLE) for _, end in ends]
        return header, [int(place) for place in places if 0 <= place < size]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError):
        return b"", [*range(0, size, max(1, size // _PLACES)), max(0, size - _SAMPLE)]


def _told(content: bytes) -> bytes:
    """A JSON file without the libraries' notes about themselves, which change when a model is saved again."""
    try:
        values = json.loads(content)
    except (ValueError, RecursionError):
        return content
    if isinstance(values, dict):
        values = {key: value for key, value in values.items() if key[:1] != "_" and key != "transformers_version"}
    return json.dumps(values, sort_keys=True).encode()

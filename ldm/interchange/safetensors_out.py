"""Writing one safetensors file with ModelSpec's header, whole or not at all."""

from __future__ import annotations

import hashlib
import mmap
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from ldm.errors import UserError
from ldm.files import whole_file, writing

HASH_KEY = "modelspec.hash_sha256"
_NO_HASH = "0x" + 64 * "0"
_CHUNK = 1 << 24


def write_safetensors(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], path: str | Path) -> None:
    """Write the tensors to `path`, replacing an older file; the hash of their bytes goes into the header.

    Raises UserError when it cannot be written; then `path` is as it was.
    """
    path = check_path(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as partial:
        save_file(dict(tensors), partial, metadata={**metadata, HASH_KEY: _NO_HASH})
        _put_hash(partial)


def check_path(path: str | Path) -> Path:
    """The path made absolute; raises UserError unless a safetensors file may have that name."""
    path = Path(path).absolute()
    if path.suffix != ".safetensors":
        raise UserError(f"{path}: found the ending {path.suffix or 'none'}; allowed is .safetensors; rename it")
    if path.is_dir():
        raise UserError(f"{path}: found a folder; allowed is the name of a file; give another")
    return path


def _put_hash(path: Path) -> None:
    """Replace the placeholder in the header by the hash of all behind the header."""
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as content:
        start = 8 + int.from_bytes(content[:8], "little")
        digest = hashlib.sha256()
        for position in range(start, len(content), _CHUNK):
            digest.update(content[position : position + _CHUNK])
        place = content.find(_NO_HASH.encode(), 0, start)
        content[place : place + len(_NO_HASH)] = f"0x{digest.hexdigest()}".encode()
        content.flush()

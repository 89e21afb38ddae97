"""Tar archives: which there are, and the headers of their members. Nothing is extracted, and no name is ever a path."""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ldm.errors import UserError, user_input

_HEADER_BYTES = 1 << 20
"""A tar header, with its long names and pax records, is smaller; Python's tarfile would read gigabytes."""
_TAR_ERRORS = (tarfile.TarError, ValueError, OverflowError, EOFError, LookupError, TypeError, RecursionError)
"""What tarfile raises for foreign bytes."""
_FORMAT = b"1"  # of the index: another one makes another hash
_END = bytes(512)


@dataclass(frozen=True)
class Shard:
    """One archive."""

    path: Path
    size: int
    modified: int
    """In nanoseconds, as the system tells it."""


def find_shards(root: str) -> list[Shard]:
    """The archives that `root` names: a folder with .tar files, one file, or a pattern such as a/{000..099}.tar or
    a/*.tar, sorted. Raises `UserError` if one of them is not there."""
    paths: list[Path] = []
    if Path(root).is_dir():
        paths = sorted(path for path in Path(root).glob("*.tar") if not path.name.startswith("."))
    elif Path(root).is_file():
        paths = [Path(root)]
    else:
        for name in _expand(root):
            found = _glob(name)
            if not found:
                raise UserError(f"{root}: found no {name}; name shards that are there, such as FOLDER/{{000..099}}.tar")
            paths += found
    if not paths:
        raise UserError(f"{root}: it holds no .tar files; give the folder of the shards, or a pattern such as a/*.tar")
    with user_input(root):
        states = [(path, path.stat()) for path in dict.fromkeys(paths)]
    return [Shard(path, state.st_size, state.st_mtime_ns) for path, state in states]


def facts_of(shards: Sequence[Shard]) -> str:
    """sha256 over names, sizes and modification times: an index is of these archives alone."""
    digest = hashlib.sha256(_FORMAT)
    for shard in shards:
        digest.update(os.fsencode(f"{shard.path.name}\0{shard.size}\0{shard.modified}\n"))
    return digest.hexdigest()


def members(
    file: io.BufferedReader, shard: Shard, broken: list[tuple[str, str]]
) -> Iterator[tuple[str, tarfile.TarInfo]]:
    """Names and headers of the plain files of a shard; what is refused goes to `broken` with its reason."""
    size, position = shard.size, -1
    limited = _Headers(file.fileno(), size)
    try:
        archive = tarfile.open(fileobj=limited, mode="r:")  # noqa: SIM115 - it holds nothing but `limited`
    except _TAR_ERRORS as error:
        raise UserError(f"{shard.path}: {_what_it_is(file, size, error)}") from error
    while True:
        limited.left = _HEADER_BYTES
        try:
            member = archive.next()
        except _TAR_ERRORS as error:
            broken.append((f"byte {archive.offset}", f"the archive is broken or cut short from here on ({error})"))
            return
        archive.members.clear()  # type: ignore[attr-defined]  # else it keeps an object for each of millions
        if member is None:
            break
        if member.offset <= position or member.size < 0:
            broken.append((f"byte {member.offset}", "the archive is broken from here on (sizes below 0)"))
            return
        position = member.offset
        if member.offset_data + member.size > size and member.isreg():
            cut = f"the archive is cut short: it ends within {member.name!r} of {member.size} bytes"
            broken.append((member.name, cut))
            return
        reason = _refused(member)
        if reason is not None:
            broken.append((member.name, reason))
        elif member.isreg():
            yield member.name, member
    # tarfile takes a broken header for the end, which is two blocks of zeros.
    if os.pread(file.fileno(), len(_END), archive.offset) != _END:
        broken.append((f"byte {archive.offset}", "the archive is broken or cut short from here on (no end mark)"))


def _refused(member: tarfile.TarInfo) -> str | None:
    """Why a member is not read; None for plain files and folders."""
    parts = member.name.split("/")
    if member.name.startswith("/") or ".." in parts:
        return "its name leaves the archive; names must be relative and without '..'"
    if member.sparse is not None:
        return "it is stored with holes (sparse); pack it as a plain file"
    if member.isdir():
        return None
    return None if member.isreg() else "it is a link or a device; only plain files are read"


def _what_it_is(file: io.BufferedReader, size: int, error: Exception) -> str:
    start = os.pread(file.fileno(), 6, 0)
    if size == 0:
        return "the file is empty; remove it or fetch it again"
    if start[:2] == b"\x1f\x8b" or start[:3] == b"BZh" or start == b"\xfd7zXZ\0" or start[:4] == b"(\xb5/\xfd":
        return "it is compressed, so its samples cannot be reached one by one; unpack it to a plain .tar"
    return f"it is no tar archive ({error}); remove it or fetch it again"


class _Headers(io.RawIOBase):
    """What tarfile reads a shard through: short pieces only, so that a forged header costs no memory."""

    def __init__(self, descriptor: int, size: int) -> None:
        self._descriptor, self._size, self._position = descriptor, size, 0
        self.left = _HEADER_BYTES
        """How much may be read for the member at hand."""

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        if base + offset < 0:
            raise tarfile.ReadError("a position before the file")
        self._position = base + offset
        return self._position

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= self.left:
            raise tarfile.ReadError(f"a header of more than {_HEADER_BYTES} bytes")
        self.left -= size
        found = os.pread(self._descriptor, size, self._position)
        self._position += len(found)
        return found


def _expand(pattern: str) -> list[str]:
    """`a{00..02}b{x,y}` to all its names, as a shell does."""
    before, brace, rest = pattern.partition("{")
    inside, closing, after = rest.partition("}")
    if not brace or not closing:
        return [pattern]
    first, dots, last = inside.partition("..")
    if dots and first.isdecimal() and last.isdecimal():
        if not 0 <= int(last) - int(first) < 1_000_000:
            raise UserError(f"{pattern}: found {{{inside}}}; allowed is a rising range of at most a million shards")
        width = len(first) if first.startswith("0") else 0
        choices = [f"{number:0{width}}" for number in range(int(first), int(last) + 1)]
    else:
        choices = inside.split(",")
    tails = _expand(after)
    return [f"{before}{choice}{tail}" for choice in choices for tail in tails]


def _glob(name: str) -> list[Path]:
    path = Path(name)
    if path.is_file() or not any(sign in path.name for sign in "*?["):
        return [path] if path.is_file() else []
    return sorted(found for found in path.parent.glob(path.name) if found.is_file())

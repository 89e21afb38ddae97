"""The images below a folder: found once, kept in a few bytes each (see metadata.py for why)."""

from __future__ import annotations

import os
import posixpath
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np

from ldm.data.images import SUFFIXES
from ldm.data.metadata import Contents, Row
from ldm.errors import UserError, user_input


class PackedStrings:
    """A read-only list of strings in one piece of memory."""

    def __init__(self, strings: Iterable[str]) -> None:
        encoded = [os.fsencode(string) for string in strings]
        self._bytes = b"".join(encoded)
        self._ends = np.cumsum([len(piece) for piece in encoded], dtype=np.int64)

    @classmethod
    def of(cls, packed: np.ndarray, ends: np.ndarray) -> PackedStrings:
        """From `packed` and `ends` as they were. Raises ValueError if these do not fit."""
        if packed.dtype != np.uint8 or ends.dtype != np.int64 or (np.diff(ends, prepend=0) < 0).any():
            raise ValueError("these are no packed strings")
        if len(packed) != (ends[-1] if len(ends) else 0):
            raise ValueError("the packed strings are cut short")
        made = cls(())
        made._bytes, made._ends = packed.tobytes(), ends
        return made

    @property
    def packed(self) -> np.ndarray:
        """The strings one after the other, uint8."""
        return np.frombuffer(self._bytes, dtype=np.uint8)

    @property
    def ends(self) -> np.ndarray:
        """Where each ends, int64."""
        return self._ends

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> str:
        start = int(self._ends[index - 1]) if index else 0
        return os.fsdecode(self._bytes[start : int(self._ends[index])])


class ScannedEntries:
    """The images found below a folder, sorted by name; the first subfolder of each is its label."""

    def __init__(self, root: Path) -> None:
        self.contents = Contents()
        self.skipped: Counter[str] = Counter()
        names: list[str] = []
        for name in walk_files(root):
            suffix = posixpath.splitext(name)[1].lower()
            if suffix in SUFFIXES:
                names.append(name)
            elif suffix == ".txt":
                self.contents.parts.add("captions")
            else:
                self.skipped[suffix or "none"] += 1
        names.sort()
        self._labelled = _are_labelled(names, root)
        if self._labelled:
            self.contents.parts.add("label")
            self.contents.labels.update(name.split("/", 1)[0] for name in names)
        self._names = PackedStrings(names)

    def __len__(self) -> int:
        return len(self._names)

    def row(self, index: int) -> Row:
        name = self._names[index]
        captions = None if "captions" in self.contents.parts else ("",)
        return Row(name, captions, label=name.split("/", 1)[0] if self._labelled else None)


def walk_files(root: Path) -> Iterator[str]:
    """Paths of all files below `root`, relative to it, with "/" between folders; what is hidden is left out."""
    seen: set[tuple[int, int]] = set()
    folders = [""]
    while folders:
        folder = folders.pop()
        with _readable(root / folder):
            status = (root / folder).stat()
        if (status.st_dev, status.st_ino) in seen:  # a link to a folder above would never end
            continue
        seen.add((status.st_dev, status.st_ino))
        with _readable(root / folder):
            scanned = os.scandir(root / folder)
        with scanned as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                name = f"{folder}/{entry.name}" if folder else entry.name
                if _is_folder(entry):
                    folders.append(name)
                else:
                    yield name


def _readable(folder: Path) -> AbstractContextManager[None]:
    return user_input(f"{folder}: it cannot be read, allow it or move it out of the data", OSError)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself: found out when it is read
        return False


def _are_labelled(names: list[str], root: Path) -> bool:
    """Whether the images lie in class subfolders: all of them or none."""
    loose = [name for name in names if "/" not in name]
    if loose and len(loose) < len(names):
        raise UserError(
            f"{root}: {len(loose)} images ({loose[0]}, ...) lie beside subfolders that hold {len(names) - len(loose)}; "
            "put every image into a class subfolder, or none, or list them in metadata.jsonl"
        )
    return bool(names) and not loose

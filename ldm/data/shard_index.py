"""What is where in WebDataset shards: tar headers read once, kept as offsets and sizes in a file beside the shards.

Nothing is extracted, and no path out of an archive is ever opened: a name in it is a key and no more.
"""

from __future__ import annotations

import io
import json
import logging
import os
import posixpath
import tarfile
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from tqdm import tqdm

from ldm.data.folder_index import PackedStrings
from ldm.data.images import SUFFIXES
from ldm.data.shard_archive import Shard, facts_of, members
from ldm.errors import UserError, user_input
from ldm.files import whole_file

logger = logging.getLogger(__name__)

IMAGE, CAPTION, JSON, SEMANTIC, MASK, LABEL = "image", "txt", "json", "semantic.png", "mask.png", "cls"
PARTS = (IMAGE, CAPTION, JSON, SEMANTIC, MASK)
"""What the index holds the place of; labels it holds itself."""
MOST_BYTES = {IMAGE: 1 << 28, SEMANTIC: 1 << 28, MASK: 1 << 28, CAPTION: 1 << 20, JSON: 1 << 24, LABEL: 64}
"""A larger member is no such thing, and is not read."""
MOST_CLASSES = 1_000_000
NO_LABEL = -1


@dataclass
class ShardIndex:
    """The samples of all shards in the archives' own order: 12 bytes for each part that the data has, and the key."""

    shard_of: np.ndarray
    """int32 [N]"""
    places: dict[str, tuple[np.ndarray, np.ndarray]]
    """Offset (int64) and size (uint32) of each part of every sample, [N] each; size 0: it has none."""
    labels: np.ndarray
    """int32 [N], -1 = none"""
    keys: PackedStrings
    """The image's name in its archive, or the name common to the members of a sample without one."""
    bad: dict[int, str]
    """Why a sample cannot be used, as far as the headers tell."""
    skipped: Counter[str] = field(default_factory=Counter)
    """Members of unknown suffix."""

    def __len__(self) -> int:
        return len(self.shard_of)


def open_index(shards: Sequence[Shard]) -> ShardIndex:
    """The index kept beside the first shard; it is made first if there is none, or none that is whole and fits.

    Raises `UserError` for a file that is no tar archive.
    """
    path = shards[0].path.parent / f".shards-{facts_of(shards)[:16]}.safetensors"
    if path.exists():
        try:
            return _read(path, shards)
        except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
            logger.warning("%s: the index is damaged (%s); it is made anew", path, " ".join(str(error).split()))
    index = build_index(shards)
    try:
        _write(path, index)
    except UserError as error:
        logger.warning("the index of the shards cannot be kept and is made at each start: %s", error)
    return index


def build_index(shards: Sequence[Shard], *, progress: bool = True) -> ShardIndex:
    """Read the headers of all members."""
    building = _Building()
    for number, shard in enumerate(tqdm(shards, desc="shard index", unit="shard", disable=not progress, leave=False)):
        building.add(number, shard)
    return building.index()


class _Building:
    """An index that grows shard by shard."""

    def __init__(self) -> None:
        self._shard_of, self._labels = array("i"), array("i")
        self._offsets = {part: array("q") for part in PARTS}
        self._sizes = {part: array("q") for part in PARTS}
        self._keys: list[bytes] = []
        self._bad: dict[int, str] = {}
        self._skipped: Counter[str] = Counter()

    def index(self) -> ShardIndex:
        there = [part for part in PARTS if part == IMAGE or any(self._sizes[part])]
        return ShardIndex(
            np.array(self._shard_of, dtype=np.int32),
            {
                part: (np.array(self._offsets[part], dtype=np.int64), np.array(self._sizes[part], dtype=np.uint32))
                for part in there
            },
            np.array(self._labels, dtype=np.int32),
            PackedStrings(os.fsdecode(key) for key in self._keys),
            self._bad,
            self._skipped,
        )

    def add(self, number: int, shard: Shard) -> None:
        """The members of one shard, gathered by key."""
        groups: dict[str, _Group] = {}
        broken: list[tuple[str, str]] = []
        with user_input(str(shard.path), OSError), shard.path.open("rb") as file:
            for name, member in members(file, shard, broken):
                directory, base = posixpath.split(name)
                stem, _, suffix = base.partition(".")
                if base.startswith("."):  # as in folders: what is hidden is left out
                    continue
                part = IMAGE if f".{suffix.lower()}" in SUFFIXES else suffix.lower()
                if part not in MOST_BYTES:
                    self._skipped[f".{suffix}" if suffix else "none"] += 1
                    continue
                groups.setdefault(posixpath.join(directory, stem), _Group()).add(part, name, member, file)
        for key, group in groups.items():
            self._append(number, group.image or key, group)
        for name, reason in broken:
            self._append(number, name, _Group(bad=reason))

    def _append(self, number: int, key: str, group: _Group) -> None:
        if group.problem is not None:
            self._bad[len(self._keys)] = group.problem
        self._shard_of.append(number)
        self._keys.append(os.fsencode(key))
        self._labels.append(group.label)
        for part in PARTS:
            offset, size = group.places.get(part, (0, 0))
            self._offsets[part].append(offset)
            self._sizes[part].append(size)


@dataclass
class _Group:
    """The members of one key."""

    places: dict[str, tuple[int, int]] = field(default_factory=dict)
    image: str | None = None
    label: int = NO_LABEL
    bad: str | None = None

    @property
    def problem(self) -> str | None:
        """Why the sample cannot be used; None if it can."""
        if self.bad is None and IMAGE not in self.places:
            there = ", ".join(f".{part}" for part in self.places) or ".cls"
            return f"it has no image (found {there})"
        return self.bad

    def add(self, part: str, name: str, member: tarfile.TarInfo, file: io.BufferedReader) -> None:
        if part in self.places or (part == LABEL and self.label != NO_LABEL):
            self.bad = f"it is there twice ({posixpath.basename(name)})"
        elif member.size == 0 and part == IMAGE:
            self.bad = "the file is empty"
        elif member.size > MOST_BYTES[part]:
            self.bad = f"{posixpath.basename(name)} has {member.size} bytes; allowed is {MOST_BYTES[part]}"
        elif part == LABEL:
            self._read_label(member, file)
            return
        self.places[part] = (member.offset_data, member.size if self.bad is None else 0)
        if part == IMAGE and self.image is None:
            self.image = name

    def _read_label(self, member: tarfile.TarInfo, file: io.BufferedReader) -> None:
        text = os.pread(file.fileno(), member.size, member.offset_data).strip()
        if text.isdigit() and int(text) < MOST_CLASSES:
            self.label = int(text)
        else:
            self.bad = f"its .cls holds {text[:20]!r}; allowed is a number from 0 on"


def _write(path: Path, index: ShardIndex) -> None:
    tensors = {"shard_of": index.shard_of, "labels": index.labels}
    tensors |= {f"{part}/offset": offsets for part, (offsets, _) in index.places.items()}
    tensors |= {f"{part}/size": sizes for part, (_, sizes) in index.places.items()}
    tensors |= {"keys": index.keys.packed, "keys/end": index.keys.ends}
    facts = {"bad": list(index.bad.items()), "skipped": dict(index.skipped)}
    with whole_file(path) as partial:
        save_file(tensors, partial, metadata={"facts": json.dumps(facts)})


def _read(path: Path, shards: Sequence[Shard]) -> ShardIndex:
    """Raises one of several errors for a file that is not as `_write` left it."""
    with safe_open(path, "np") as file:
        tensors: dict[str, Any] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        facts = json.loads(file.metadata()["facts"])
    parts = [part for part in PARTS if f"{part}/size" in tensors]
    index = ShardIndex(
        tensors["shard_of"],
        {part: (tensors[f"{part}/offset"], tensors[f"{part}/size"]) for part in parts},
        tensors["labels"],
        PackedStrings.of(tensors["keys"], tensors["keys/end"]),
        {int(place): str(reason) for place, reason in facts["bad"]},
        Counter(facts["skipped"]),
    )
    columns = [index.labels, *(column for pair in index.places.values() for column in pair), tensors["keys/end"]]
    sizes = np.array([shard.size for shard in shards], dtype=np.int64)
    whole = IMAGE in index.places and all(column.shape == (len(index),) for column in columns)
    if not whole or len(index) == 0 or not 0 <= index.shard_of.min() <= index.shard_of.max() < len(shards):
        raise ValueError("its columns do not fit together")
    for offsets, lengths in index.places.values():
        if (offsets < 0).any() or (offsets + lengths.astype(np.int64) > sizes[index.shard_of]).any():
            raise ValueError("it points behind the end of a shard")
    return index

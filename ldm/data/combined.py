"""Several sources as one: each with its number of repeats in an epoch and the weight of its samples' loss."""

from __future__ import annotations

import hashlib
import json
import math
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate

import numpy as np

from ldm.data.folder import FolderSource
from ldm.data.huggingface import HuggingFaceSource
from ldm.data.naming import renumbering
from ldm.data.sample import UNKNOWN_CLASS, BadSample, Sample, Source
from ldm.data.shards import ShardsSource
from ldm.errors import UserError


@dataclass(frozen=True)
class Part:
    """One of the sources that are combined."""

    source: Source
    repeats: int = 1
    """How many times each of its samples comes in one epoch (kohya's meaning)."""
    weight: float = 1.0
    """Factor of the loss of its samples."""

    def __post_init__(self) -> None:
        """Raise `ValueError` for a number that is not allowed."""
        check_part(self.repeats, self.weight)


def check_part(repeats: int, weight: float) -> None:
    """Raise `ValueError` for repeats or a weight that are not allowed."""
    if repeats < 1:
        raise ValueError(f"repeats: found {repeats}; allowed is 1 or more; leave the folder out instead")
    if not (weight > 0 and math.isfinite(weight)):
        raise ValueError(f"weight: found {weight}; allowed is a number above 0; leave the folder out instead")


class CombinedSource:
    """The samples of all parts, one part after the other, a part with n repeats n times in a row.

    Labels and classes of maps that have the same name in several parts are one. A key is the part's folder and the key
    in it; a repeated sample has one key. Raises `UserError` for no parts, two parts of one folder, or too many classes.
    """

    def __init__(self, parts: Sequence[Part]) -> None:
        if not parts:
            raise UserError("data: found no sources to combine; give one or more")
        self.parts = tuple(parts)
        self.classes = _union(part.source.classes for part in parts)
        self.semantic_classes = _union(part.source.semantic_classes for part in parts)
        if len(self.semantic_classes) > UNKNOWN_CLASS:
            found = f"found {len(self.semantic_classes)} classes of semantic maps in all folders together"
            raise UserError(f"data: {found}; allowed is {UNKNOWN_CLASS}; give the same thing the same name")
        self._names = tuple(_name(part.source, number) for number, part in enumerate(parts))
        pairs = zip(self._names, parts, strict=True)
        self.names = tuple(one for name, part in pairs for one in _all_names(name, part.source))
        if len(set(self.names)) < len(self.names):
            raise UserError(f"data: found one folder twice in {', '.join(self.names)}; give it once, with repeats")
        self._renumber = [renumbering(part.source, self.classes, self.semantic_classes) for part in parts]
        self._starts = (0, *accumulate(len(part.source) * part.repeats for part in parts))
        self.distinct_starts = (0, *accumulate(distinct_length(part.source) for part in parts))

    def __len__(self) -> int:
        return self._starts[-1]

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over the parts' own, their repeats and weights, in order."""
        facts = [[part.source.fingerprint, part.repeats, part.weight] for part in self.parts]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def size(self, index: int) -> tuple[int, int]:
        """Width and height of image `index`; see `Source`."""
        number, place = self._place(index)
        with _named(self._names[number]):
            return self.parts[number].source.size(place)

    def read(self, index: int, *, with_image: bool = True) -> Sample:
        """Sample `index`; see `Source`."""
        number, place = self._place(index)
        part, name = self.parts[number], self._names[number]
        with _named(name):
            sample = part.source.read(place, with_image=with_image)
        if sample.semantic is not None and self.semantic_classes and not part.source.semantic_classes:
            reason = "its semantic map's classes have no names while other folders' have; add classes.txt to its folder"
            raise BadSample(name + sample.key, reason)
        sample = self._renumber[number](sample)
        return replace(sample, key=name + sample.key, weight=sample.weight * part.weight)

    def distinct(self) -> CombinedSource:
        """Each sample once, and the weights all 1: the pictures alone."""
        return CombinedSource([Part(distinct(part.source)) for part in self.parts])

    def distinct_index(self, index: int) -> int:
        """The index of the same sample in `distinct()`."""
        number, place = self._place(index)
        return self.distinct_starts[number] + distinct_index(self.parts[number].source, place)

    def _place(self, index: int) -> tuple[int, int]:
        """The part's number, and the index in its source."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} is outside 0..{len(self) - 1}")
        number = bisect_right(self._starts, index) - 1
        return number, (index - self._starts[number]) % len(self.parts[number].source)


def distinct(source: Source) -> Source:
    """The source without repeats: what is worth computing once per sample goes by its indices."""
    return source.distinct() if isinstance(source, CombinedSource) else source


def distinct_index(source: Source, index: int) -> int:
    """The index in `distinct(source)` of the sample `index` of `source`."""
    return source.distinct_index(index) if isinstance(source, CombinedSource) else index


def distinct_indices(source: Source) -> np.ndarray:
    """`distinct_index` of every index, int64 [len(source)]."""
    if not isinstance(source, CombinedSource):
        return np.arange(len(source))
    return np.concatenate(
        [
            start + np.tile(distinct_indices(part.source), part.repeats)
            for start, part in zip(source.distinct_starts, source.parts, strict=False)
        ]
    )


def distinct_length(source: Source) -> int:
    """How many different samples there are."""
    return source.distinct_starts[-1] if isinstance(source, CombinedSource) else len(source)


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Let a `BadSample` name its folder too."""
    try:
        yield
    except BadSample as error:
        raise BadSample(name + error.key, error.reason) from error


def _union(lists: Iterable[Sequence[str]]) -> tuple[str, ...]:
    """Each name once, in the order in which they first come."""
    return tuple(dict.fromkeys(name for names in lists for name in names))


def _name(source: Source, number: int) -> str:
    """What the keys of a part begin with: its folder; a combination of folders names them itself."""
    if isinstance(source, FolderSource | ShardsSource | HuggingFaceSource):
        return f"{source.root}/"
    return "" if _of_folders(source) else f"part {number}/"


def _of_folders(source: Source) -> bool:
    if isinstance(source, CombinedSource):
        return all(_of_folders(part.source) for part in source.parts)
    return isinstance(source, FolderSource | ShardsSource | HuggingFaceSource)


def _all_names(name: str, source: Source) -> tuple[str, ...]:
    """What all keys of a part begin with."""
    return tuple(name + inner for inner in source.names) if isinstance(source, CombinedSource) else (name,)

"""Aspect-ratio buckets: the shapes that images are brought to, and which image goes where.

Every image keeps nearly its own shape instead of losing its sides to a square, and a batch holds images of one shape.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

Size = tuple[int, int]
"""Width and height in pixels."""
UNREADABLE = 0
"""Width and height of an image whose header could not be read."""
_CHUNK = 1 << 20


@dataclass(frozen=True, kw_only=True)
class BucketsConfig:
    """Which shapes there are, see `bucket_sizes`."""

    step: int = 64
    """Sides are multiples of so many pixels; itself a multiple of the autoencoder's factor, usually 8."""
    max_aspect: float = 2.0
    """Longer side to shorter side, at most; longer images are cropped."""

    def __post_init__(self) -> None:
        """Check every field; raise `ValueError` naming it."""
        if self.step < 8:
            raise ValueError(f"step: found {self.step}; allowed is 8 or more; 64 is usual")
        if not 1.0 < self.max_aspect < 100:
            raise ValueError(
                f"max_aspect: found {self.max_aspect}; allowed is above 1; 2 is usual; for squares leave buckets out"
            )


def bucket_sizes(resolution: int, config: BucketsConfig) -> tuple[Size, ...]:
    """The shapes (width, height), tallest first: for each width the greatest height, and for each height the greatest
    width, that keep the area at resolution^2 or less, as far as no side is longer than `max_aspect` times the other.

    Both sides are multiples of `step`. This is the construction of NovelAI and kohya's trainers, so the square is among
    them where `resolution` is a multiple of `step`. No two have the same aspect ratio.
    """
    step, area = config.step, resolution * resolution
    found = set()
    for side in range(step, area // step + 1, step):
        other = area // side // step * step
        if other and max(side, other) <= config.max_aspect * min(side, other):
            found |= {(side, other), (other, side)}
    return tuple(sorted(found, key=lambda size: size[0] / size[1]))


def check_resolution(resolution: int, config: BucketsConfig) -> None:
    """Raise `ValueError` unless the square is one of the shapes."""
    if resolution < config.step or resolution % config.step:
        near = max(1, resolution // config.step) * config.step
        raise ValueError(
            f"resolution: found {resolution} with buckets of step {config.step}; allowed is a multiple of the step; "
            f"set {near}, or another step"
        )


def nearest(sizes: np.ndarray, buckets: Sequence[Size]) -> np.ndarray:
    """The bucket of nearest aspect ratio, by the distance of logarithms, for images of `sizes` [N, 2]; int16 [N].

    `buckets` are sorted by width / height. An image exactly between two goes to the taller one. -1: unreadable.
    """
    logs = np.array([math.log(width / height) for width, height in buckets])
    between = (logs[1:] + logs[:-1]) / 2
    result = np.empty(len(sizes), dtype=np.int16)
    for start in range(0, len(sizes), _CHUNK):  # bounds the memory for millions of images
        part = np.asarray(sizes[start : start + _CHUNK], dtype=np.float64)
        readable = (part != UNREADABLE).all(axis=1)
        aspects = np.log(part[:, 0], where=readable, out=np.zeros(len(part)))
        aspects -= np.log(part[:, 1], where=readable, out=np.zeros(len(part)))
        result[start : start + _CHUNK] = np.where(readable, np.searchsorted(between, aspects), -1)
    return result


def nearest_size(size: Size, buckets: Sequence[Size]) -> Size:
    """The bucket of one image."""
    return buckets[int(nearest(np.array([size]), buckets)[0])]


class Buckets:
    """The samples of a source, bucket by bucket; only buckets that hold some are there.

    A place counts through all buckets: those of bucket b are `starts[b]` to `starts[b + 1] - 1`, by rising index.
    """

    def __init__(self, sizes: Sequence[Size], counts: Sequence[int], path: Path | None = None) -> None:
        """`path` is an .npy file with the index of the sample at each place; None: place and index are the same."""
        self.sizes = tuple(sizes)
        self.starts = (0, *accumulate(counts))
        self._path = path
        self._members: np.ndarray | None = None

    def __len__(self) -> int:
        """How many samples there are."""
        return self.starts[-1]

    def count(self, bucket: int) -> int:
        """How many samples there are in a bucket."""
        return self.starts[bucket + 1] - self.starts[bucket]

    def bucket_of(self, place: int) -> int:
        """The bucket that a place belongs to."""
        return bisect_right(self.starts, place) - 1

    def index(self, place: int) -> int:
        """The sample at a place."""
        return place if self._path is None else int(self._opened(self._path)[place])

    def indices(self, start: int, end: int) -> np.ndarray:
        """The samples at the places from `start` up to, not including, `end`."""
        return np.arange(start, end) if self._path is None else np.asarray(self._opened(self._path)[start:end])

    def summary(self, batch_size: int) -> str:
        """One line: how many samples each bucket holds, and which of them hold few."""
        parts = [f"{width}x{height}: {self.count(b)}" for b, (width, height) in enumerate(self.sizes)]
        few = [part for b, part in enumerate(parts) if self.count(b) < batch_size]
        line = f"buckets (width x height: images): {', '.join(parts)}"
        return f"{line}; fewer than a batch of {batch_size}, so repeated within it: {', '.join(few)}" if few else line

    def _opened(self, path: Path) -> np.ndarray:
        if self._members is None:  # in the process that reads, so that workers share the pages, not the handle
            self._members = np.load(path, mmap_mode="r")
        return self._members

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_members": None}

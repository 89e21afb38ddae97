"""What a latent cache is on the disk: its header, and where the rows of each bucket are."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

import numpy as np

from autoencoder.model import Autoencoder, weights_hash
from ldm.data.buckets import Buckets
from ldm.data.sample import Source
from ldm.data.sources import DataConfig

FORMAT = 1
MOMENTS, OFFSETS, HEADER = "moments.f16", "offsets.i64", "header.json"


@dataclass(frozen=True)
class Layout:
    """Where the moments are in the file, which is counted in numbers of two bytes."""

    shapes: tuple[tuple[int, ...], ...]
    """Of the rows of each bucket: [N, 1 or 2, 2, C, h, w], plain and mirrored, mean and log-variance."""

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """Where each bucket begins, and the end."""
        return (0, *accumulate(int(np.prod(shape)) for shape in self.shapes))

    def row(self, bucket: int) -> int:
        """The length of a row."""
        return int(np.prod(self.shapes[bucket][1:]))

    def at(self, offset: int) -> tuple[slice, tuple[int, ...]]:
        """The row that begins at `offset`, and its shape [1 or 2, 2, C, h, w]."""
        bucket = bisect_right(self.starts, offset) - 1
        return slice(offset, offset + self.row(bucket)), self.shapes[bucket][1:]

    def views(self, moments: np.ndarray) -> list[np.ndarray]:
        """The rows of each bucket."""
        ends = zip(self.starts, self.starts[1:], self.shapes, strict=False)
        return [moments[start:end].reshape(shape) for start, end, shape in ends]


def layout_of(header: Mapping[str, Any]) -> Layout:
    """The layout that a cache's header tells."""
    # Caches that were made before there were buckets name the one shape.
    shapes = header["shapes"] if "shapes" in header else [header["shape"]]
    return Layout(tuple(tuple(shape) for shape in shapes))


def expected_header(
    source: Source, config: DataConfig, autoencoder: Autoencoder, buckets: Buckets | None = None
) -> dict[str, Any]:
    """What a cache must say of itself to be used with this data and this autoencoder."""
    transform: dict[str, Any] = {"resolution": config.resolution, "crop": config.crop}
    if buckets is not None:
        transform["buckets"] = [[*size, buckets.count(bucket)] for bucket, size in enumerate(buckets.sizes)]
    return {
        "format": FORMAT,
        "autoencoder": weights_hash(autoencoder),
        "data": source.fingerprint,
        "images": len(source),
        "transform": transform,
        "flips": config.flip,
    }

"""Posterior moments of every image, computed once: fp16 mean and log-variance in one memory-mapped file (DESIGN.md 5).

Moments are cached, never samples: each step draws its own sample of the posterior. They are raw; scaling happens where
they are read (`autoencoder.latents.to_unet`). A header names the autoencoder, the data and the transform, and a cache
that does not match all three is refused. Rows are in the order of `Buckets`: one bucket after the other, each with rows
of its own shape; a repeated sample has one row.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from autoencoder.model import Autoencoder, downsampling_factor
from ldm.data.bucket_index import open_buckets
from ldm.data.combined import distinct
from ldm.data.latent_encoding import CacheConfig as CacheConfig
from ldm.data.latent_encoding import build_cache
from ldm.data.latent_rows import HEADER, MOMENTS, OFFSETS, expected_header, layout_of
from ldm.data.sample import BadSample, Source
from ldm.data.share import Share
from ldm.data.sources import DataConfig
from ldm.errors import UserError, user_input


class LatentCache:
    """A finished cache. Raises `BadSample` for images that were unusable when it was built."""

    def __init__(self, folder: Path, header: Mapping[str, Any]) -> None:
        self.folder = folder
        self.supports_flip = bool(header["flips"])
        self._bad: dict[int, tuple[str, str]] = {int(i): (key, reason) for i, key, reason in header["bad"]}
        self._layout = layout_of(header)
        self._moments: np.memmap | None = None
        self._offsets: np.memmap | None = None

    def read(self, index: int, flipped: bool) -> tuple[Tensor, Tensor]:
        """Mean and log-variance, float32 [C, h, w], of image `index`, mirrored if `flipped`."""
        if index in self._bad:
            raise BadSample(*self._bad[index])
        if self._moments is None:  # opened in the process that reads, so that workers share the pages, not the handle
            self._moments = np.memmap(self.folder / MOMENTS, dtype=np.float16, mode="r")
        place, shape = self._layout.at(self._offset(index))
        mean, logvar = self._moments[place].reshape(shape)[int(flipped)].astype(np.float32)
        return torch.from_numpy(mean), torch.from_numpy(logvar)

    def _offset(self, index: int) -> int:
        if len(self._layout.shapes) == 1:
            return index * self._layout.row(0)
        if self._offsets is None:
            self._offsets = np.memmap(self.folder / OFFSETS, dtype=np.int64, mode="r")
        return int(self._offsets[index])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_moments": None, "_offsets": None}


def cached_latents(
    folder: Path, source: Source, config: DataConfig, autoencoder: Autoencoder, build: CacheConfig, share: Share
) -> LatentCache:
    """The cache in `folder`, built first if there is none. Raises `UserError` if it is of other data or weights.

    It counts the different samples of `source`, see `ldm.data.combined.distinct_index`.
    """
    source = distinct(source)
    buckets = open_buckets(buckets_folder(folder), source, config, downsampling_factor(autoencoder), share)
    expected = expected_header(source, config, autoencoder, buckets)
    cache = open_cache(folder, expected)
    share.wait()  # else a fast process could find the cache that a slow one has just seen missing
    if cache is None:
        build_cache(folder, source, config, autoencoder, build, share, buckets)
        cache = open_cache(folder, expected)
    if cache is None:
        raise UserError(f"latent cache {folder}: it has gone while it was being built; do not delete it meanwhile")
    return cache


def buckets_folder(cache: Path) -> Path:
    """Where the index of the buckets is kept: beside the cache, since it serves every cache of the data."""
    return cache.with_name(f"{cache.name}-buckets")


def open_cache(folder: Path, expected: Mapping[str, Any]) -> LatentCache | None:
    """The cache in `folder`, None if there is none. Raises `UserError` naming what differs if it is stale."""
    path = folder / HEADER
    if not path.exists():
        return None
    with user_input(f"latent cache {folder}"):
        header = json.loads(path.read_text(encoding="utf-8"))
    for name, value in expected.items():
        if header.get(name) != value:
            raise UserError(
                f"latent cache {folder}: made with {name} = {header.get(name)}, this run has {value}; "
                "delete the folder to build it anew, or name another with cache.folder"
            )
    layout = layout_of(header)
    wanted = {MOMENTS: layout.starts[-1] * 2}
    if len(layout.shapes) > 1:
        wanted[OFFSETS] = int(header["images"]) * 8
    for name, size in wanted.items():
        with user_input(f"latent cache {folder}"):
            found = (folder / name).stat().st_size
        if found != size:
            raise UserError(f"latent cache {folder}: found {found} bytes in {name}, expected {size}; delete the folder")
    return LatentCache(folder, header)

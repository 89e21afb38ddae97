"""Posterior moments of every image, computed once: fp16 mean and log-variance in one memory-mapped file (DESIGN.md 5).

Moments are cached, never samples: each step draws its own sample of the posterior. They are raw; scaling happens where
they are read (`autoencoder.latents.to_unet`). A header names the autoencoder, the data and the transform, and a cache
that does not match all three is refused.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from autoencoder.latents import encode
from autoencoder.model import Autoencoder, downsampling_factor, latent_channels, weights_hash
from ldm.data.sample import BadSample, Source
from ldm.data.sources import DataConfig
from ldm.data.transforms import transform
from ldm.errors import UserError, user_input

FORMAT = 1
_MOMENTS, _HEADER = "moments.f16", "header.json"


@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """Whether and where moments are kept. `folder` null: `latents/` in the run folder."""

    enabled: bool = True
    folder: str | None = None
    batch_size: int = 32  # images encoded at once while the cache is built
    workers: int = 2  # processes that read images while the cache is built

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size: found {self.batch_size}; allowed is 1 or more")
        if self.workers < 0:
            raise ValueError(f"workers: found {self.workers}; allowed is 0 or more")


@dataclass(frozen=True)
class Share:
    """Which part of the work is this process's, and how it waits for the others."""

    rank: int = 0
    processes: int = 1
    wait: Callable[[], None] = lambda: None

    def of(self, length: int) -> range:
        """A run of neighbouring indices, so that each process writes its own pages."""
        return range(self.rank * length // self.processes, (self.rank + 1) * length // self.processes)


class LatentCache:
    """A finished cache. Raises `BadSample` for images that were unusable when it was built."""

    def __init__(self, folder: Path, header: Mapping[str, Any]) -> None:
        self.folder = folder
        self.supports_flip = bool(header["flips"])
        self._bad: dict[int, tuple[str, str]] = {int(i): (key, reason) for i, key, reason in header["bad"]}
        self._shape = tuple(header["shape"])
        self._moments: np.memmap | None = None

    def read(self, index: int, flipped: bool) -> tuple[Tensor, Tensor]:
        """Mean and log-variance, float32 [C, h, w], of image `index`, mirrored if `flipped`."""
        if index in self._bad:
            raise BadSample(*self._bad[index])
        if self._moments is None:  # opened in the process that reads, so that workers share the pages, not the handle
            self._moments = np.memmap(self.folder / _MOMENTS, dtype=np.float16, mode="r", shape=self._shape)
        mean, logvar = self._moments[index, int(flipped)].astype(np.float32)
        return torch.from_numpy(mean), torch.from_numpy(logvar)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_moments": None}


def cached_latents(
    folder: Path, source: Source, config: DataConfig, autoencoder: Autoencoder, build: CacheConfig, share: Share
) -> LatentCache:
    """The cache in `folder`, built first if there is none. Raises `UserError` if it is of other data or weights."""
    expected = expected_header(source, config, autoencoder)
    cache = open_cache(folder, expected)
    share.wait()  # else a fast process could find the cache that a slow one has just seen missing
    if cache is None:
        build_cache(folder, source, config, autoencoder, build, share)
        cache = open_cache(folder, expected)
    if cache is None:
        raise UserError(f"latent cache {folder}: it has gone while it was being built; do not delete it meanwhile")
    return cache


def expected_header(source: Source, config: DataConfig, autoencoder: Autoencoder) -> dict[str, Any]:
    """What a cache must say of itself to be used with this data and this autoencoder."""
    return {
        "format": FORMAT,
        "autoencoder": weights_hash(autoencoder),
        "data": source.fingerprint,
        "images": len(source),
        "transform": {"resolution": config.resolution, "crop": config.crop},
        "flips": config.flip,
    }


def open_cache(folder: Path, expected: Mapping[str, Any]) -> LatentCache | None:
    """The cache in `folder`, None if there is none. Raises `UserError` naming what differs if it is stale."""
    path = folder / _HEADER
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
    with user_input(f"latent cache {folder}"):
        size, wanted = (folder / _MOMENTS).stat().st_size, int(np.prod(header["shape"])) * 2
    if size != wanted:
        raise UserError(f"latent cache {folder}: found {size} bytes of moments, expected {wanted}; delete the folder")
    return LatentCache(folder, header)


@torch.no_grad()
def build_cache(
    folder: Path, source: Source, config: DataConfig, autoencoder: Autoencoder, build: CacheConfig, share: Share
) -> None:
    """Encode this process's share of `source` into a folder beside the final place; the rename makes it a cache.

    Raises `UserError`, and leaves nothing, if no image can be read or the disk refuses.
    """
    header = expected_header(source, config, autoencoder)
    side = config.resolution // downsampling_factor(autoencoder)
    header["shape"] = [len(source), 1 + config.flip, 2, latent_channels(autoencoder), side, side]
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        with user_input(f"latent cache {folder}: cannot be written", OSError):
            _build(partial, header, source, config, autoencoder, build, share)
            if share.rank == 0:
                shutil.rmtree(folder, ignore_errors=True)
                partial.rename(folder)
            share.wait()
    finally:
        if share.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)


def _build(
    partial: Path,
    header: dict[str, Any],
    source: Source,
    config: DataConfig,
    autoencoder: Autoencoder,
    build: CacheConfig,
    share: Share,
) -> None:
    """Everything but the rename."""
    if share.rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        with (partial / _MOMENTS).open("wb") as file:
            _reserve(file, int(np.prod(header["shape"])) * 2)
    share.wait()
    bad = _write_moments(partial, tuple(header["shape"]), source, config, autoencoder, build, share)
    (partial / f"bad-{share.rank}.json").write_text(json.dumps(bad), encoding="utf-8")
    share.wait()
    if share.rank == 0:
        lists = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(partial.glob("bad-*.json"))]
        header["bad"] = [entry for entries in lists for entry in entries]
        if len(header["bad"]) == len(source):
            raise UserError(f"latent cache: none of {len(source)} images can be read; `ldm data check` says why")
        (partial / _HEADER).write_text(json.dumps(header), encoding="utf-8")


def _reserve(file: BinaryIO, size: int) -> None:
    """Give the file its size, on the disk too: a mapped page that finds no room would kill the process by SIGBUS."""
    if not hasattr(os, "posix_fallocate"):
        file.truncate(size)
        return
    try:
        os.posix_fallocate(file.fileno(), 0, size)
    except OSError as error:
        cure = "make room, name another place with cache.folder, or set cache.enabled=false"
        raise OSError(error.errno, f"{error.strerror}; it needs {size / 2**20:.1f} MiB; {cure}") from error


def _write_moments(
    folder: Path,
    shape: tuple[int, ...],
    source: Source,
    config: DataConfig,
    autoencoder: Autoencoder,
    build: CacheConfig,
    share: Share,
) -> list[tuple[int, str, str]]:
    """Fill this process's rows; returns index, key and reason of what could not be read."""
    moments = np.memmap(folder / _MOMENTS, dtype=np.float16, mode="r+", shape=shape)
    bad: list[tuple[int, str, str]] = []
    indices = share.of(len(source))
    loader = DataLoader(
        _Images(source, config),
        sampler=indices,
        batch_size=build.batch_size,
        num_workers=build.workers,
        collate_fn=list,
        generator=torch.Generator().manual_seed(0),  # else the loader draws from the global one
    )
    with tqdm(total=len(indices), desc="latent cache", unit="image", disable=share.rank != 0) as progress:
        for items in loader:
            bad += [(index, *image) for index, image in items if not isinstance(image, Tensor)]
            good = [(index, image) for index, image in items if isinstance(image, Tensor)]
            if good:
                images = torch.stack([image for _, image in good])  # [B, 3, R, R]
                moments[[index for index, _ in good]] = _encode_both_ways(autoencoder, images, flips=config.flip)
            progress.update(len(items))
    moments.flush()
    return bad


class _Images(Dataset[tuple[int, "Tensor | tuple[str, str]"]]):
    """Index and image [3, R, R], or the key and reason of a sample that cannot be used. Runs in the workers."""

    def __init__(self, source: Source, config: DataConfig) -> None:
        self._source, self._config = source, config

    def __getitem__(self, index: int) -> tuple[int, Tensor | tuple[str, str]]:
        try:
            image = transform(self._source.read(index), self._config, None).image
        except BadSample as error:
            return index, (error.key, error.reason)
        if image is None:
            raise TypeError("a source read with its image gives an image")
        return index, image


def _encode_both_ways(autoencoder: Autoencoder, images: Tensor, *, flips: bool) -> np.ndarray:
    """fp16 moments [B, 1 or 2, 2, C, h, w]: second axis plain and mirrored, third mean and log-variance."""
    device = next(autoencoder.parameters()).device
    views = [images, images.flip(-1)] if flips else [images]
    moments = [encode(autoencoder, view.to(device)) for view in views]
    stacked = torch.stack([torch.stack([m.mean, m.logvar], dim=1) for m in moments], dim=1)
    return stacked.cpu().half().numpy()

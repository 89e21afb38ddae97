"""Fill a latent cache: every image through the autoencoder once, each process its share."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from autoencoder.latents import encode
from autoencoder.model import Autoencoder, downsampling_factor, latent_channels
from ldm.data.buckets import Buckets
from ldm.data.latent_rows import HEADER, MOMENTS, OFFSETS, Layout, expected_header, layout_of
from ldm.data.loader import dead_worker_told
from ldm.data.sample import BadSample, Source
from ldm.data.share import Share
from ldm.data.sources import DataConfig
from ldm.data.transforms import Geometry, apply_geometry
from ldm.errors import UserError, user_input

_OVERFLOWED = "its latents are NaN or Inf, or beyond what the cache can hold (65,504)"


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


@torch.no_grad()
def build_cache(
    folder: Path,
    source: Source,
    config: DataConfig,
    autoencoder: Autoencoder,
    build: CacheConfig,
    share: Share,
    buckets: Buckets | None = None,
) -> None:
    """Encode this process's share of `source` into a folder beside the final place; the rename makes it a cache.

    Raises `UserError`, and leaves nothing, if no image of a bucket can be read or the disk refuses.
    """
    header = expected_header(source, config, autoencoder, buckets)
    buckets = buckets or Buckets([(config.resolution, config.resolution)], [len(source)])
    factor, channels = downsampling_factor(autoencoder), latent_channels(autoencoder)
    header["shapes"] = [
        [buckets.count(bucket), 1 + config.flip, 2, channels, height // factor, width // factor]
        for bucket, (width, height) in enumerate(buckets.sizes)
    ]
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        with user_input(f"latent cache {folder}: cannot be written", OSError), dead_worker_told():
            _build(partial, header, source, config, autoencoder, build, share, buckets)
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
    buckets: Buckets,
) -> None:
    """Everything but the rename."""
    layout = layout_of(header)
    if share.rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        with (partial / MOMENTS).open("wb") as file:
            _reserve(file, layout.starts[-1] * 2)
        if len(layout.shapes) > 1:
            _write_offsets(partial, layout, buckets)
    share.wait()
    bad = _write_moments(partial, layout, _Images(source, buckets), autoencoder, build, share, flips=config.flip)
    (partial / f"bad-{share.rank}.json").write_text(json.dumps(bad), encoding="utf-8")
    share.wait()
    if share.rank == 0:
        lists = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(partial.glob("bad-*.json"))]
        found = [(place, key, reason) for entries in lists for place, key, reason in entries]
        _check_readable(found, buckets)
        header["bad"] = [[buckets.index(place), key, reason] for place, key, reason in found]
        (partial / HEADER).write_text(json.dumps(header), encoding="utf-8")


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


def _write_offsets(folder: Path, layout: Layout, buckets: Buckets) -> None:
    """The file that says where the row of each sample begins."""
    with (folder / OFFSETS).open("wb") as file:
        _reserve(file, len(buckets) * 8)
    offsets = np.memmap(folder / OFFSETS, dtype=np.int64, mode="r+")
    for bucket, (start, end) in enumerate(zip(buckets.starts, buckets.starts[1:], strict=False)):
        offsets[buckets.indices(start, end)] = layout.starts[bucket] + np.arange(end - start) * layout.row(bucket)
    offsets.flush()


def _check_readable(bad: list[tuple[int, str, str]], buckets: Buckets) -> None:
    """A bucket without one good image would stop the training at the first batch of it, perhaps after hours."""
    counts = Counter(buckets.bucket_of(place) for place, _, _ in bad)
    for bucket, count in sorted(counts.items()):
        if count == buckets.count(bucket):
            width, height = buckets.sizes[bucket]
            key, reason = next((key, reason) for place, key, reason in bad if buckets.bucket_of(place) == bucket)
            which = f"{count} images" if len(buckets.sizes) == 1 else f"{count} images of the bucket {width}x{height}"
            raise UserError(
                f"latent cache: none of {which} can be read (first {key}: {reason}); mend or remove them; "
                "`ldm data check` lists the reasons"
            )


def _batches_of_one_size(buckets: Buckets, places: range, batch_size: int) -> Iterator[list[int]]:
    for start, end in zip(buckets.starts, buckets.starts[1:], strict=False):
        for first in range(max(start, places.start), min(end, places.stop), batch_size):
            yield list(range(first, min(first + batch_size, end, places.stop)))


def _write_moments(
    folder: Path,
    layout: Layout,
    images: _Images,
    autoencoder: Autoencoder,
    build: CacheConfig,
    share: Share,
    *,
    flips: bool,
) -> list[tuple[int, str, str]]:
    """Fill this process's rows; returns place, key and reason of what could not be read."""
    buckets = images.buckets
    moments = np.memmap(folder / MOMENTS, dtype=np.float16, mode="r+")
    rows = layout.views(moments)
    bad: list[tuple[int, str, str]] = []
    places = share.of(len(buckets))
    loader = DataLoader(
        images,
        batch_sampler=_batches_of_one_size(buckets, places, build.batch_size),
        num_workers=build.workers,
        collate_fn=list,
        generator=torch.Generator().manual_seed(0),  # else the loader draws from the global one
    )
    with tqdm(total=len(places), desc="latent cache", unit="image", disable=share.rank != 0) as progress:
        for items in loader:
            bad += [(place, key, reason) for place, key, reason in items if isinstance(reason, str)]
            good = [(place, key, image) for place, key, image in items if isinstance(image, Tensor)]
            if good:
                bucket = buckets.bucket_of(good[0][0])
                places_in_bucket = [place - buckets.starts[bucket] for place, _, _ in good]
                pixels = torch.stack([image for _, _, image in good])  # [B, 3, H, W]
                encoded = _encode_both_ways(autoencoder, pixels, flips=flips)
                rows[bucket][places_in_bucket] = encoded
                finite = np.isfinite(encoded).all(axis=tuple(range(1, encoded.ndim)))  # [B]
                bad += [(*good[row][:2], _OVERFLOWED) for row in np.flatnonzero(~finite)]
            progress.update(len(items))
    moments.flush()
    return bad


class _Images(Dataset[tuple[int, str, "Tensor | str"]]):
    """Place, key, and image [3, H, W] or the reason why it cannot be used. Runs in the workers."""

    def __init__(self, source: Source, buckets: Buckets) -> None:
        self._source, self.buckets = source, buckets

    def __getitem__(self, place: int) -> tuple[int, str, Tensor | str]:
        size = self.buckets.sizes[self.buckets.bucket_of(place)]
        try:
            sample = self._source.read(self.buckets.index(place))
            image = apply_geometry(sample, size, Geometry()).image
        except BadSample as error:
            return place, error.key, error.reason
        if image is None:
            raise TypeError("a source read with its image gives an image")
        return place, sample.key, image


def _encode_both_ways(autoencoder: Autoencoder, images: Tensor, *, flips: bool) -> np.ndarray:
    """fp16 moments [B, 1 or 2, 2, C, h, w]: second axis plain and mirrored, third mean and log-variance."""
    device = next(autoencoder.parameters()).device
    views = [images, images.flip(-1)] if flips else [images]
    moments = [encode(autoencoder, view.to(device)) for view in views]
    stacked = torch.stack([torch.stack([m.mean, m.logvar], dim=1) for m in moments], dim=1)
    return stacked.cpu().half().numpy()

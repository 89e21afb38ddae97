"""Which sample is in which bucket: sizes read from headers once, kept in files that are memory-mapped.

For ten million images these are 80 MB of sizes and 80 MB of indices on the disk, and nothing per sample in memory.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.lib.format import open_memmap
from tqdm import tqdm

from ldm.data.buckets import UNREADABLE, Buckets, Size, bucket_sizes, nearest
from ldm.data.combined import distinct, distinct_indices
from ldm.data.sample import BadSample, Source
from ldm.data.share import Share
from ldm.data.sources import DataConfig
from ldm.errors import UserError, user_input
from ldm.files import whole_file

_CHUNK = 1024  # headers handed to the threads at once
_THREADS = 8


def open_buckets(folder: Path, source: Source, config: DataConfig, factor: int, share: Share) -> Buckets | None:
    """The buckets of `source`, None where `config.buckets` is null; what must be measured is kept in `folder`.

    The files there are named after the data, so that they may lie beside a cache that several runs share. `factor` is
    that of the autoencoder. An image whose size cannot be read goes to the fullest bucket, to be found out when it is
    read. Every process calls this. Raises `UserError` if step and factor do not fit or no size can be read.
    """
    if config.buckets is None:
        return None
    if config.buckets.step % factor:
        raise UserError(
            f"data.buckets.step: found {config.buckets.step}; the autoencoder makes one latent of {factor} x {factor} "
            f"pixels; allowed is a multiple of {factor}; set {-(-config.buckets.step // factor) * factor}"
        )
    pictures = distinct(source)
    sizes_path = folder / f"sizes-{_short_hash(pictures.fingerprint)}.npy"
    members_path = folder / f"members-{_short_hash(f'{source.fingerprint} {config.resolution} {config.buckets}')}.npy"
    if share.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        if not sizes_path.exists():
            _write_sizes(sizes_path, pictures)
    share.wait()
    sizes = _load(sizes_path, len(pictures))
    shapes = bucket_sizes(config.resolution, config.buckets)
    found = assign(sizes, shapes)
    members = found[distinct_indices(source)]  # [len(source)], repeats and all
    counts = np.bincount(members, minlength=len(shapes))
    if share.rank == 0 and not members_path.exists():
        with whole_file(members_path) as partial, partial.open("wb") as file:
            np.save(file, np.argsort(members, kind="stable"))
    share.wait()
    _load(members_path, len(source))
    there = np.flatnonzero(counts).tolist()
    return Buckets([shapes[b] for b in there], [int(counts[b]) for b in there], members_path)


def assign(sizes: np.ndarray, shapes: tuple[Size, ...]) -> np.ndarray:
    """The bucket of every image of `sizes` [N, 2]; unreadable ones go to the fullest. Raises `UserError` for none."""
    found = nearest(sizes, shapes)
    unreadable = found < 0
    if unreadable.all():
        raise UserError(f"data: none of {len(sizes)} images can be read; `ldm data check` lists the reasons")
    found[unreadable] = np.bincount(found[~unreadable]).argmax()
    return found


def read_sizes(source: Source, *, progress: bool = True) -> Iterator[Size]:
    """Width and height of every sample, in order; (0, 0) where the header cannot be read.

    Several threads read: headers are a matter of waiting for the disk.
    """

    def size(index: int) -> Size:
        try:
            return source.size(index)
        except BadSample:
            return UNREADABLE, UNREADABLE

    bar = tqdm(total=len(source), desc="image sizes", unit="file", disable=not progress)
    with ThreadPoolExecutor(min(_THREADS, 2 * (os.cpu_count() or 1))) as pool, bar:
        for start in range(0, len(source), _CHUNK):
            for found in pool.map(size, range(start, min(start + _CHUNK, len(source)))):
                bar.update()
                yield found


def _write_sizes(path: Path, source: Source) -> None:
    with whole_file(path) as partial:
        sizes = open_memmap(partial, mode="w+", dtype=np.int32, shape=(len(source), 2))
        for index, size in enumerate(read_sizes(source)):
            sizes[index] = size
        sizes.flush()


def _load(path: Path, length: int) -> np.ndarray:
    """An array from a file of ours, memory-mapped."""
    with user_input(f"{path}: delete it, it will be made anew", ValueError, OSError):
        array = np.load(path, mmap_mode="r")
        if len(array) != length:
            raise ValueError(f"found {len(array)} entries, expected {length}")
    return array


def _short_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]

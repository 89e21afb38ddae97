"""Find what cannot be used in a folder of images, without stopping: headers first, then every pixel."""

from __future__ import annotations

import os
import posixpath
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ldm.data.buckets import Size, nearest
from ldm.data.folder import FolderSource
from ldm.data.folder_index import ScannedEntries, walk_files
from ldm.data.images import SUFFIXES
from ldm.data.sample import BadSample
from ldm.data.shards import ShardsSource

_Found = tuple[str, bool, int | None] | BadSample
"""Key, whether there is a caption, and label of a usable sample."""
_CHUNK = 1024  # samples handed to the threads at once: bounds the memory for millions of files


@dataclass(frozen=True)
class Problem:
    """One file or row that cannot be used."""

    name: str
    reason: str


@dataclass
class CheckReport:
    """What `check_folder` found."""

    root: str
    images: int = 0
    """Rows or files looked at."""
    unusable: list[Problem] = field(default_factory=list)
    warnings: dict[str, list[str]] = field(default_factory=dict)
    """What was noticed, and the files concerned; they can be used all the same."""
    short_sides: tuple[int, float, int] | None = None
    """Least, median and greatest short side in pixels, of the files whose header can be read."""
    classes: dict[str, int] = field(default_factory=dict)
    """Usable images of each label."""
    buckets: dict[str, int] = field(default_factory=dict)
    """Images of each bucket, "width x height", of the files whose header can be read."""

    @property
    def usable(self) -> int:
        return self.images - len(self.unusable)

    def warn(self, what: str, name: str) -> None:
        self.warnings.setdefault(what, []).append(name)

    def summary(self) -> str:
        """One line."""
        parts = [f"{self.root}: {self.usable} of {self.images} images can be used, {len(self.unusable)} cannot"]
        if self.short_sides:
            least, middle, most = self.short_sides
            parts.append(f"short sides {least} to {most} px (median {middle:g})")
        if self.classes:
            parts.append(f"{len(self.classes)} classes")
        return "; ".join(parts)

    def as_json(self) -> dict[str, object]:
        """The whole report as plain values."""
        return {**asdict(self), "usable": self.usable}


def check_folder(
    root: str | Path,
    *,
    caption_column: str = "text",
    min_side: int = 64,
    buckets: Sequence[Size] = (),
    threads: int | None = None,
    progress: bool = True,
    on_unusable: Callable[[Problem], None] = lambda problem: None,
) -> CheckReport:
    """Read every image of a folder (layouts: `FolderSource`) or of shards (`ShardsSource`); report what cannot be used
    or looks wrong.

    `on_unusable` hears of each unusable file as soon as it is found. Files with a short side below `min_side` pixels
    are warned of. The images of each of `buckets` are counted (shapes as `bucket_sizes` gives them). Raises `UserError`
    if the folder as a whole cannot be used.
    """
    report = CheckReport(str(root))

    def unusable(name: str, reason: str) -> None:
        report.unusable.append(Problem(name, reason))
        on_unusable(report.unusable[-1])

    source = _open(root, caption_column, unusable)
    report.images = len(source) + len(report.unusable)
    readable = _check_headers(source, report, unusable, min_side, buckets, progress)
    _check_pixels(source, readable, report, unusable, threads or min(8, os.cpu_count() or 1), progress)
    if isinstance(source, FolderSource):
        _check_names(source, report)
    else:
        _warn_of_skipped(source.index.skipped, report)
    return report


def _open(root: str | Path, caption_column: str, on_problem: Callable[[str, str], None]) -> FolderSource | ShardsSource:
    """A folder of images, or shards: a folder that holds .tar files and nothing else to read, or no folder at all."""
    folder = Path(root)
    archives = folder.is_dir() and any(folder.glob("*.tar")) and not any(folder.glob("metadata.*"))
    named = not folder.is_dir() and str(root).endswith(".tar")
    if named or (archives and not any(_suffix_of(name) in SUFFIXES for name in walk_files(folder))):
        return ShardsSource(root, caption_column=caption_column)
    return FolderSource(root, caption_column=caption_column, on_problem=on_problem)


def _suffix_of(name: str) -> str:
    return posixpath.splitext(name)[1].lower()


def _warn_of_skipped(skipped: Counter[str], report: CheckReport) -> None:
    for suffix, count in sorted(skipped.items()):
        report.warn("not read, unknown suffix", f"{count} files {suffix}")


def _check_headers(
    source: FolderSource | ShardsSource,
    report: CheckReport,
    unusable: Callable[[str, str], None],
    min_side: int,
    buckets: Sequence[Size],
    progress: bool,
) -> Sequence[int]:
    """The cheap pass: missing, empty and foreign files. Returns the indices worth decoding."""
    readable, sizes = array("q"), array("i")
    for index in tqdm(range(len(source)), desc="headers", unit="file", disable=not progress):
        key = source.key(index)
        try:
            size = source.size(index)
        except BadSample as error:
            unusable(error.key, error.reason)
            continue
        readable.append(index)
        sizes.extend(size)
        if min(size) < min_side:
            report.warn(f"short side below {min_side} px", key)
    if sizes:
        pairs = np.array(sizes).reshape(-1, 2)
        sides = pairs.min(axis=1)
        report.short_sides = (int(sides.min()), float(np.median(sides)), int(sides.max()))
        if buckets:
            counts = np.bincount(nearest(pairs, buckets), minlength=len(buckets)).tolist()
            names = [f"{width}x{height}" for width, height in buckets]
            report.buckets = dict(zip(names, counts, strict=True))
    return readable


def _check_pixels(
    source: FolderSource | ShardsSource,
    indices: Sequence[int],
    report: CheckReport,
    unusable: Callable[[str, str], None],
    threads: int,
    progress: bool,
) -> None:
    """The thorough pass: decode images, maps and masks, read captions and labels."""
    labels: Counter[int] = Counter()
    with tqdm(total=len(indices), desc="pixels", unit="file", disable=not progress) as bar:
        for found in _in_threads(lambda index: _look_at(source, index), indices, threads):
            bar.update()
            if isinstance(found, BadSample):
                unusable(found.key, found.reason)
                continue
            key, captioned, label = found
            if not captioned:
                report.warn("no caption", key)
            if label is not None:
                labels[label] += 1
    report.classes = {source.classes[label]: count for label, count in sorted(labels.items())}


def _look_at(source: FolderSource | ShardsSource, index: int) -> _Found:
    """What is there; the pixels are let go at once."""
    try:
        sample = source.read(index)
    except BadSample as error:
        return error
    return sample.key, any(caption.strip() for caption in sample.captions), sample.label


def _in_threads(work: Callable[[int], _Found], items: Sequence[int], threads: int) -> Iterator[_Found]:
    """Results in order. Pillow's decoders let other threads run."""
    with ThreadPoolExecutor(threads) as pool:
        for start in range(0, len(items), _CHUNK):
            yield from pool.map(work, items[start : start + _CHUNK])


def _check_names(source: FolderSource, report: CheckReport) -> None:
    """Warn of files that nobody will read, and of images that share one caption file."""
    if isinstance(source.entries, ScannedEntries):
        _warn_of_skipped(source.entries.skipped, report)
        stems = Counter(posixpath.splitext(source.key(index))[0] for index in range(len(source)))
        for stem in sorted(stem for stem, count in stems.items() if count > 1):
            report.warn("same name but for the suffix, so they share a caption file", f"{stem}.*")
        return
    rows = (source.entries.row(index) for index in range(len(source)))
    listed = {name for row in rows for name in (row.file_name, row.semantic, row.mask)}
    listed |= {problem.name for problem in report.unusable}
    for name in sorted(walk_files(source.root)):
        if _suffix_of(name) in SUFFIXES and name not in listed:
            report.warn("not in the metadata file, so not read", name)

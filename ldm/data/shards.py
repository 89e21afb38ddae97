"""WebDataset shards as a source: random access by an index, so that order and resume are as for a folder."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from PIL import Image

from ldm.data.folder import read_semantic_classes
from ldm.data.images import open_image, open_mask, open_semantic, read_header
from ldm.data.metadata import check_captions
from ldm.data.sample import BadSample, Sample
from ldm.data.sample_parts import caption_lines, check_classes, check_size
from ldm.data.shard_archive import Shard, facts_of, find_shards
from ldm.data.shard_index import (
    CAPTION,
    IMAGE,
    JSON,
    MASK,
    NO_LABEL,
    SEMANTIC,
    ShardIndex,
    open_index,
)
from ldm.errors import UserError

_HEADER_BYTES = 1 << 17
"""Where the size of an image is told, but for few."""


class ShardsSource:
    """The samples of plain .tar archives as webdataset and img2dataset write them.

    Members whose names agree up to the first dot are one sample: `a.jpg` (or .png, .webp, ...), `a.txt` (captions, one
    a line), `a.json` (its `caption_column`, or `caption`, if there is no .txt; the rest comes back in `Sample.extra`),
    `a.cls` (the number of the label), `a.semantic.png`, `a.mask.png`. A file classes.txt beside the archives names the
    classes of the maps. What is broken, lacks its image or is there twice is a `BadSample` when it is read.

    `root` is a folder of archives, one archive, or a pattern (see `find_shards`). The archives are read where they are;
    nothing is extracted. Raises `UserError` for what is not there or no tar archive.
    """

    def __init__(self, root: str | Path, *, caption_column: str = "text") -> None:
        self.root, self.caption_column = str(root), caption_column
        self.shards = find_shards(str(root))
        self.index: ShardIndex = open_index(self.shards)
        if not len(self.index):
            raise UserError(f"{root}: the archives hold no images; samples are members such as 0001.jpg and 0001.txt")
        self.fingerprint = facts_of(self.shards)
        highest = int(self.index.labels.max(initial=NO_LABEL))
        self.classes = tuple(str(number) for number in range(highest + 1))
        self.semantic_classes = (
            read_semantic_classes(self.shards[0].path.parent) if SEMANTIC in self.index.places else ()
        )
        names = Counter(shard.path.name for shard in self.shards)
        self._names = [s.path.name if names[s.path.name] == 1 else str(s.path) for s in self.shards]

    def __len__(self) -> int:
        return len(self.index)

    def key(self, index: int) -> str:
        """Archive and name in it."""
        return f"{self._names[self.index.shard_of[index]]}/{self.index.keys[index]}"

    def size(self, index: int) -> tuple[int, int]:
        """Width and height of image `index`, from its header."""
        key = self._checked(index)
        start = self._bytes(index, IMAGE, _HEADER_BYTES)
        try:
            return read_header(start, key=key)
        except BadSample:  # some have much before it, or the directory of a TIFF behind the pixels
            return read_header(self._bytes(index, IMAGE), key=key)

    def read(self, index: int, *, with_image: bool = True) -> Sample:
        """Sample `index`; see `Source`."""
        key = self._checked(index)
        image = open_image(self._bytes(index, IMAGE), key=key) if with_image else None
        captions, extra = self._told(index, key)
        label = int(self.index.labels[index])
        return Sample(
            key=key,
            image=image,
            captions=captions,
            semantic=self._semantic(index, key, image),
            mask=self._part(index, key, MASK, open_mask, image),
            label=None if label == NO_LABEL else label,
            extra=extra,
        )

    def _checked(self, index: int) -> str:
        """The key of a sample that can be used as far as the index tells."""
        key = self.key(index)
        if index in self.index.bad:
            raise BadSample(key, self.index.bad[index])
        return key

    def _has(self, index: int, part: str) -> bool:
        return part in self.index.places and bool(self.index.places[part][1][index])

    def _bytes(self, index: int, part: str, most: int | None = None) -> bytes:
        offsets, sizes = self.index.places[part]
        size = int(sizes[index]) if most is None else min(most, int(sizes[index]))
        return _cut(self.shards[self.index.shard_of[index]], int(offsets[index]), size)

    def _told(self, index: int, key: str) -> tuple[tuple[str, ...], dict[str, object]]:
        """Captions, and what else the .json tells."""
        values = self._json(index, key) if self._has(index, JSON) else {}
        told = values.pop(self.caption_column, None)
        if told is None and self.caption_column == "text":
            told = values.pop("caption", None)  # img2dataset's name
        if self._has(index, CAPTION):
            try:
                told = list(caption_lines(self._bytes(index, CAPTION)))
            except ValueError as error:
                raise BadSample(key, f"its caption (.txt) is no UTF-8 ({error})") from error
        captions = [told] if isinstance(told, str) else told or [""]
        if not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
            raise BadSample(key, f"its caption is {told!r}; it must be a caption or a list of captions")
        try:
            check_captions(captions, "its caption")
        except ValueError as error:
            raise BadSample(key, str(error)) from error
        return tuple(captions), values

    def _json(self, index: int, key: str) -> dict[str, object]:
        try:
            values = json.loads(self._bytes(index, JSON))
        except (ValueError, RecursionError) as error:
            raise BadSample(key, f"its .json cannot be read ({error})") from error
        if not isinstance(values, dict):
            raise BadSample(key, f"its .json holds a {type(values).__name__}; it must be an object")
        return values

    def _semantic(self, index: int, key: str, image: Image.Image | None) -> Image.Image | None:
        semantic = self._part(index, key, SEMANTIC, open_semantic, image)
        if semantic is not None:
            check_classes(semantic, self.semantic_classes, key, "its semantic map")
        return semantic

    def _part(
        self, index: int, key: str, part: str, read: Callable[..., Image.Image], image: Image.Image | None
    ) -> Image.Image | None:
        if not self._has(index, part):
            return None
        try:
            picture = read(self._bytes(index, part), key=key)
        except BadSample as error:
            raise BadSample(key, f"its .{part}: {error.reason}") from error
        check_size(picture, image, key, f"its .{part}")
        return picture


def _cut(shard: Shard, offset: int, size: int) -> bytes:
    """Bytes of an archive that is as it was when it was indexed."""
    try:
        with shard.path.open("rb") as file:
            state = os.fstat(file.fileno())
            if (state.st_size, state.st_mtime_ns) != (shard.size, shard.modified):
                raise UserError(f"{shard.path}: it changed while in use; start again")
            return os.pread(file.fileno(), size, offset)
    except OSError as error:
        raise BadSample(shard.path.name, f"it cannot be read ({error.strerror or error})") from error

"""A folder of images as a source: a metadata file, caption files beside the images, or class subfolders."""

from __future__ import annotations

import hashlib
import os
import posixpath
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

from PIL import Image

from conditioning.class_file import read_classes
from ldm.data.folder_index import ScannedEntries
from ldm.data.images import open_image, open_mask, open_plain, open_semantic, read_header
from ldm.data.metadata import METADATA_NAMES, MetadataEntries, OnProblem, Row, stop_at_problem
from ldm.data.sample import BadSample, Sample
from ldm.data.sample_parts import CLASSES_NAME, caption_lines, check_classes, check_size
from ldm.errors import UserError, user_input

MOST_CAPTION_BYTES = 1 << 20
"""A longer file is no caption."""
_MOST_CLASSES = 1_000_000
_OTHER_CAPTION_COLUMNS = ("caption", "captions", "prompt")


class FolderSource:
    """The images of one folder, in one of three layouts.

    1. `metadata.jsonl` or `metadata.csv` in the folder: one row an image with `file_name`, and if wanted `text` (a
       caption, in JSON also a list of them), `semantic` and `mask` (paths), `label` (a name or number). Further columns
       come back in `Sample.extra`. All paths are relative to the folder and stay inside it.
    2. Class subfolders: the first subfolder's name is the label.
    3. Just images, all directly in the folder.

    A row or image without a caption takes the lines of the `.txt` file with its stem, one caption a line, else "".
    `label`, `semantic` and `mask` are for all images or none: an image that lacks one is a `BadSample`.

    `on_problem(name, reason)` is called for unusable rows; by default the first one raises `UserError`.
    """

    def __init__(
        self, root: str | Path, *, caption_column: str = "text", on_problem: OnProblem = stop_at_problem
    ) -> None:
        self.root = Path(root)
        if not self.root.is_dir():
            raise UserError(f"{self.root}: no such folder; give the folder that holds the images")
        self.metadata_path = _metadata_path(self.root)
        self.entries: MetadataEntries | ScannedEntries
        if self.metadata_path is None:
            self.entries = ScannedEntries(self.root)
        else:
            self.entries = MetadataEntries(self.metadata_path, caption_column, on_problem)
            _check_caption_column(self.entries, caption_column)
        if not len(self.entries):
            shards = next(self.root.glob("*.tar"), None)
            cure = "for its .tar files set data.source: shards" if shards else "put images or a metadata.jsonl there"
            raise UserError(f"{self.root}: it holds no images; {cure}")
        self._parts = frozenset(self.entries.contents.parts)
        self.classes = _classes(self.entries.contents.labels, self.root)
        self._label_index = {name: index for index, name in enumerate(self.classes)}
        self.semantic_classes = read_semantic_classes(self.root)

    def __len__(self) -> int:
        return len(self.entries)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over names, sizes and modification times of the images and the metadata file, in order."""
        digest = hashlib.sha256()
        names = (self.entries.row(index).file_name for index in range(len(self)))
        for name in (*([self.metadata_path.name] if self.metadata_path else []), *names):
            try:
                status = os.stat(self.root / name)  # noqa: PTH116 - a Path object for each of millions costs more
                facts = f"{name}\0{status.st_size}\0{status.st_mtime_ns}\n"
            except OSError:
                facts = f"{name}\0missing\n"
            digest.update(os.fsencode(facts))
        return digest.hexdigest()

    def key(self, index: int) -> str:
        """The name of image `index`, without opening anything but the metadata file."""
        return self.entries.row(index).file_name

    def size(self, index: int) -> tuple[int, int]:
        """Width and height of image `index`, from its header."""
        key = self.key(index)
        return read_header(self.root / key, key=key)

    def read(self, index: int, *, with_image: bool = True) -> Sample:
        """Sample `index`; see `Source`."""
        row = self.entries.row(index)
        image = open_image(self.root / row.file_name, key=row.file_name) if with_image else None
        return Sample(
            key=row.file_name,
            image=image,
            captions=self.captions(row),
            semantic=self._semantic(row, image),
            mask=self._mask(row, image),
            label=None if row.label is None else self._label_index[str(row.label)],
            extra=row.extra,
        )

    def captions(self, row: Row) -> tuple[str, ...]:
        """The row's own captions, else the lines of the caption file beside the image, else ("",)."""
        if row.captions is not None:
            return row.captions
        path = self.root / (posixpath.splitext(row.file_name)[0] + ".txt")
        try:
            with open_plain(path) as file:
                content = file.read(MOST_CAPTION_BYTES + 1)
            if len(content) > MOST_CAPTION_BYTES:
                raise ValueError(f"it has more than {MOST_CAPTION_BYTES} bytes")
            return caption_lines(content)
        except (FileNotFoundError, NotADirectoryError):
            return ("",)
        except (OSError, ValueError) as error:
            raise BadSample(row.file_name, f"its caption file {path.name} cannot be read ({error})") from error

    def _semantic(self, row: Row, image: Image.Image | None) -> Image.Image | None:
        if row.semantic is None:
            return None
        semantic = self._part(row, row.semantic, open_semantic, image)
        check_classes(semantic, self.semantic_classes, row.file_name, f"its semantic map {row.semantic}")
        return semantic

    def _mask(self, row: Row, image: Image.Image | None) -> Image.Image | None:
        return None if row.mask is None else self._part(row, row.mask, open_mask, image)

    def _part(self, row: Row, name: str, read: Callable[[Path], Image.Image], image: Image.Image | None) -> Image.Image:
        """The map or mask in the file `name`; it must be of the image's size."""
        try:
            part = read(self.root / name)
        except BadSample as error:
            raise BadSample(row.file_name, f"{name}: {error.reason}") from error
        check_size(part, image, row.file_name, name)
        return part


def _metadata_path(root: Path) -> Path | None:
    found = [root / name for name in METADATA_NAMES if (root / name).is_file()]
    if len(found) > 1:
        raise UserError(f"{root}: it holds metadata.jsonl and metadata.csv; keep one of them")
    return found[0] if found else None


def _check_caption_column(entries: MetadataEntries, column: str) -> None:
    """A caption column that no row has is a slip, unless the name is the default and no other name suggests itself."""
    columns = sorted(entries.contents.columns - {"file_name", "semantic", "mask", "label"})
    likely = [name for name in _OTHER_CAPTION_COLUMNS if name in columns]
    if column not in columns and (column != "text" or likely):
        hint = likely[0] if likely else "text"
        found = ", ".join(columns) or "none"
        raise UserError(
            f"{entries.path}: no column {column!r} for captions; found {found}; set data.caption_column, as in {hint}"
        )


def _classes(labels: set[str | int], root: Path) -> tuple[str, ...]:
    """Names of the labels: sorted names, or "0", "1", ... up to the highest number."""
    numbers = [label for label in labels if isinstance(label, int)]
    names = sorted(label for label in labels if isinstance(label, str))
    if numbers and names:
        raise UserError(f"{root}: labels are names ({names[0]!r}) and numbers ({numbers[0]}); use one or the other")
    if numbers and max(numbers) >= _MOST_CLASSES:
        raise UserError(f"{root}: found the label {max(numbers)}; numbers count classes from 0; give names instead")
    return tuple(str(number) for number in range(max(numbers) + 1)) if numbers else tuple(names)


def read_semantic_classes(folder: Path) -> tuple[str, ...]:
    """The names in the folder's classes.txt, () if there is none. Raises `UserError`."""
    path = folder / CLASSES_NAME
    if not path.is_file():
        return ()
    with user_input(str(path)):
        return read_classes(path)

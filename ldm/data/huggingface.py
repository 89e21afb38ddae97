"""A Hugging Face dataset as a source: hub id, saved folder, parquet or arrow files (the extra `data`)."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from ldm.data.images import open_image, open_mask, open_semantic, read_header
from ldm.data.sample import BadSample, Sample
from ldm.data.sample_parts import check_size
from ldm.errors import UserError, user_input

if TYPE_CHECKING:
    from datasets import Dataset

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


class HuggingFaceSource:
    """Rows of one split. Image columns hold images as `datasets.Image` stores them (encoded bytes or a local path).

    `caption_column` holds a caption or a list of them; `label_column` class indices, numbers or names. A root that
    exists as a path is opened without the network; anything else must be a hub id, which is downloaded.
    """

    def __init__(
        self,
        root: str,
        *,
        split: str = "train",
        image_column: str = "image",
        caption_column: str = "text",
        label_column: str | None = None,
        semantic_column: str | None = None,
        mask_column: str | None = None,
    ) -> None:
        self.root, self.split = root, split
        self.caption_column, self.label_column = caption_column, label_column
        self._picture_columns = {"image": image_column, "semantic": semantic_column, "mask": mask_column}
        dataset = _open(root, split)
        used = {"image_column": image_column, "caption_column": caption_column, "label_column": label_column}
        used |= {"semantic_column": semantic_column, "mask_column": mask_column}
        _check_columns(dataset, used, root)
        if not len(dataset):
            raise UserError(f"{root}: the split {split!r} has no rows; choose another")
        columns = sorted({column for column in used.values() if column is not None})
        digest = hashlib.sha256(f"{split}\0{columns}\0{len(dataset)}\0{dataset._fingerprint}".encode())
        self.fingerprint = digest.hexdigest()
        self._dataset = _undecoded(dataset)
        self._without_image = self._dataset.remove_columns(image_column)  # so that captions cost no image bytes
        self._images = self._dataset.select_columns(image_column)
        self.classes = _classes(dataset, label_column)
        self._label_index = {name: index for index, name in enumerate(self.classes)}
        self.semantic_classes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self._dataset)

    def size(self, index: int) -> tuple[int, int]:
        """Width and height of image `index`, from its header."""
        key = f"{self.split}/{index}"
        ((column, value),) = self._images[index].items()
        return read_header(_file(value, f"image (column {column!r})", key), key=key)

    def read(self, index: int, *, with_image: bool = True) -> Sample:
        """Sample `index`; see `Source`. The key is split/index."""
        key = f"{self.split}/{index}"
        row = dict((self._dataset if with_image else self._without_image)[index])
        image = self._picture(row, "image", key) if with_image else None
        semantic, mask = self._picture(row, "semantic", key), self._picture(row, "mask", key)
        for name, part in (("semantic", semantic), ("mask", mask)):
            if part is not None:
                check_size(part, image, key, f"its {name}")
        captions = _captions(row.pop(self.caption_column), key)
        label = self._label(row.pop(self.label_column)) if self.label_column is not None else None
        return Sample(key, image, captions, semantic, mask, label, extra=row)

    def _picture(self, row: dict[str, Any], name: str, key: str) -> Image.Image | None:
        """Take the column of `name` out of the row and decode it."""
        column = self._picture_columns[name]
        if column is None:
            return None
        value = row.pop(column)
        if value is None and name != "image":  # what some samples lack is unknown for them
            return None
        file = _file(value, f"{name} (column {column!r})", key)
        try:
            return {"image": open_image, "semantic": open_semantic, "mask": open_mask}[name](file)
        except BadSample as error:
            raise BadSample(key, error.reason if name == "image" else f"its {name}: {error.reason}") from error

    def _label(self, value: object) -> int | None:
        if value is None or value == -1:  # -1 is how `datasets` writes "no label" for class labels
            return None
        return value if isinstance(value, int) else self._label_index[str(value)]


def _file(value: object, what: str, key: str) -> bytes | str:
    """The encoded picture, or its path, that an image column holds."""
    file = value.get("bytes") or value.get("path") if isinstance(value, dict) else value
    if not isinstance(file, bytes | str):
        raise BadSample(key, f"its {what} is missing")
    return file


def _open(root: str, split: str) -> Dataset:
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            f"data.source: huggingface needs the package `datasets`, which cannot be imported ({error}); "
            "run pip install 'ldm[data]'"
        ) from error
    path = Path(root).expanduser()
    if not path.exists() and not _HUB_ID.fullmatch(root):
        raise UserError(f"{root}: no such file or folder, and it is no hub id (name or owner/name); correct data.root")
    errors = (ValueError, OSError, LookupError, datasets.exceptions.DatasetsError)
    with user_input(f"dataset {root} (split {split!r})", *errors):
        return _open_local(path, split) if path.exists() else datasets.load_dataset(root, split=split)


def _open_local(path: Path, split: str) -> Dataset:
    """Open a saved dataset, a single file, or a folder of files, without the network."""
    import datasets

    if path.is_file():
        if path.suffix == ".arrow":
            return datasets.Dataset.from_file(str(path))
        if path.suffix == ".parquet":
            return datasets.load_dataset("parquet", data_files={split: str(path)}, split=split)
        raise ValueError(
            f"found a {path.suffix or 'nameless'} file; allowed are .parquet and .arrow files, and folders"
        )
    if (path / "dataset_dict.json").is_file():
        return datasets.load_from_disk(str(path))[split]
    if (path / "state.json").is_file():
        return datasets.load_from_disk(str(path))
    return datasets.load_dataset(str(path), split=split)


def _check_columns(dataset: Dataset, used: dict[str, str | None], root: str) -> None:
    for option, column in used.items():
        if column is not None and column not in dataset.column_names:
            found = ", ".join(dataset.column_names)
            raise UserError(f"data.{option}: found {column!r}; {root} has the columns {found}; name one of them")


def _undecoded(dataset: Dataset) -> Dataset:
    """Image columns as bytes or paths: our own reader decodes them, with its rules for EXIF, alpha and bad files."""
    import datasets

    for name, feature in dataset.features.items():
        if isinstance(feature, datasets.Image):
            dataset = dataset.cast_column(name, datasets.Image(decode=False))
    return dataset


def _classes(dataset: Dataset, column: str | None) -> tuple[str, ...]:
    if column is None:
        return ()
    names = getattr(dataset.features[column], "names", None)
    if names:
        return tuple(names)
    values = [value for value in dataset.unique(column) if value is not None]
    if all(isinstance(value, int) and value >= 0 for value in values):
        return tuple(str(number) for number in range(max(values, default=-1) + 1))
    if all(isinstance(value, str) for value in values):
        return tuple(sorted(values))
    raise UserError(f"data.label_column: {column!r} holds {values[0]!r}; labels are names or numbers from 0 on")


def _captions(value: object, key: str) -> tuple[str, ...]:
    captions = [value] if isinstance(value, str) else value
    if captions is None or captions == []:
        return ("",)
    if not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
        raise BadSample(key, f"its caption is {captions!r}; it must be a text or a list of texts")
    return tuple(captions)

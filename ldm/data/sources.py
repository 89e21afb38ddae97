"""Which data to train on, and which shape it gets: the config, and the source that it names."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from ldm.data.buckets import BucketsConfig, check_resolution
from ldm.data.combined import CombinedSource, Part, check_part
from ldm.data.folder import FolderSource
from ldm.data.huggingface import HuggingFaceSource
from ldm.data.sample import Source
from ldm.data.scenes import ScenesConfig, ScenesSource
from ldm.data.shards import ShardsSource
from ldm.errors import UserError


@dataclass(frozen=True, kw_only=True)
class DataFolder:
    """One of several folders of images."""

    root: str
    repeats: int = 1
    """How many times each of its images comes in one epoch."""
    weight: float = 1.0
    """Factor of the loss of its images."""

    def __post_init__(self) -> None:
        """Raise `ValueError` for a number that is not allowed."""
        check_part(self.repeats, self.weight)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the samples come from and how they are cropped."""

    source: Literal["folder", "shards", "huggingface", "scenes"] = "folder"
    root: str | None = None
    """folder: the folder. shards: a folder of .tar files, or FOLDER/{000..099}.tar, or FOLDER/*.tar.
    huggingface: a folder, a .parquet or .arrow file, or a hub id (only that is downloaded)."""
    folders: tuple[DataFolder, ...] | None = None
    """folder: several of them, in place of `root`. Labels and classes of maps are joined by name."""
    split: str = "train"
    """huggingface only."""
    image_column: str = "image"
    """huggingface only."""
    caption_column: str = "text"
    """Column of the dataset or of the metadata file: a caption or a list of captions."""
    label_column: str | None = None
    """huggingface only, like the two below; None = not used. A folder's are always `label`, `semantic`, `mask`."""
    semantic_column: str | None = None
    mask_column: str | None = None
    resolution: int = 256
    """Side of the square images in pixels; with `buckets`, the side of the square that no image's area exceeds."""
    buckets: BucketsConfig | None = None
    """Shapes between tall and wide, each image the one nearest to its own; null: squares."""
    crop: Literal["center", "random"] = "center"
    flip: bool = False
    """Mirror half of the samples, left to right."""
    max_bad_share: float = 0.01
    """Training stops once more than this share of the samples cannot be used."""
    scenes: ScenesConfig = field(default_factory=ScenesConfig)

    def __post_init__(self) -> None:
        """Check every field; raise `ValueError` naming it."""
        if self.resolution < 8:
            raise ValueError(
                f"resolution: found {self.resolution}; allowed is 8 or more; give the images' side in pixels"
            )
        if not 0.0 <= self.max_bad_share <= 1.0:
            raise ValueError(f"max_bad_share: found {self.max_bad_share}; allowed is 0 to 1; give a share such as 0.01")
        if self.folders is not None:
            self._check_folders(self.folders)
        if self.buckets is not None:
            self._check_buckets(self.buckets)
        if self.flip and self.source == "scenes" and self.scenes.relations and self.scenes.max_objects > 1:
            raise ValueError(
                "flip: found true with scenes whose captions say left and right; allowed is false; "
                "remove it or set scenes.relations: false"
            )

    def _check_folders(self, folders: tuple[DataFolder, ...]) -> None:
        if self.root is not None:
            raise ValueError(f"root: found {self.root!r} beside folders; allowed is one of the two; set the other null")
        if self.source != "folder":
            raise ValueError(f"folders: found with source {self.source}; allowed with source folder; leave it out")
        if not folders:
            raise ValueError("folders: found an empty list; allowed is one folder or more; name one, or set it null")

    def _check_buckets(self, buckets: BucketsConfig) -> None:
        if self.source == "scenes":
            raise ValueError("buckets: found with source scenes, which are all squares; allowed is null; leave it out")
        check_resolution(self.resolution, buckets)


def open_source(config: DataConfig) -> Source:
    """The source that `config` names. Raises `UserError` if it is not there or cannot be used."""
    if config.source == "scenes":
        return ScenesSource(config.scenes, config.resolution)
    if config.folders is not None:
        folders = [
            (folder, FolderSource(folder.root, caption_column=config.caption_column)) for folder in config.folders
        ]
        return CombinedSource([Part(source, folder.repeats, folder.weight) for folder, source in folders])
    if not config.root:
        examples = {"folder": "a folder of images", "shards": "a folder of .tar files"}
        example = examples.get(config.source, "a local dataset or a hub id")
        raise UserError(
            f"data.root: found nothing for source {config.source}; give {example}, or set data.source: scenes"
        )
    if config.source == "folder":
        return FolderSource(config.root, caption_column=config.caption_column)
    if config.source == "shards":
        return ShardsSource(config.root, caption_column=config.caption_column)
    return HuggingFaceSource(
        config.root,
        split=config.split,
        image_column=config.image_column,
        caption_column=config.caption_column,
        label_column=config.label_column,
        semantic_column=config.semantic_column,
        mask_column=config.mask_column,
    )

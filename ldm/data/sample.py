"""The one sample type, its collated form, and what a source of samples must offer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Protocol

from conditioning.unknown import UNKNOWN_CLASS as UNKNOWN_CLASS
from conditioning.unknown import UNKNOWN_LABEL as UNKNOWN_LABEL

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image
    from torch import Tensor


@dataclass(frozen=True)
class Sample:
    """One image and what is known of it, before resizing and cropping."""

    key: str
    """Unique within its source, and stable: messages and the quarantine name samples by it."""
    image: Image | None = None
    """Mode RGB; None when read with `with_image=False`."""
    captions: tuple[str, ...] = ("",)
    """Never empty: a sample without a caption has the caption ""."""
    semantic: Image | None = None
    """Mode L, the image's size: class indices, 255 = unknown."""
    mask: Image | None = None
    """Mode L, the image's size: 255 = repaint, 0 = keep, in between = soft."""
    label: int | None = None
    """Index into the source's `classes`."""
    weight: float = 1.0
    """Factor of its loss."""
    extra: Mapping[str, object] = field(default_factory=dict)
    """Whatever else the source knows (further columns of the metadata file, the scene's description, ...)."""


class BadSample(Exception):  # noqa: N818 - it names the thing found, as StopIteration does
    """One sample that cannot be used: `key` says which, `reason` why, in plain words."""

    def __init__(self, key: str, reason: str) -> None:
        super().__init__(key, reason)
        self.key = key
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.key}: {self.reason}"


class Source(Protocol):
    """Random access to samples. It can be pickled (worker processes) and holds little per sample (millions of them)."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the labels, () if there are no labels."""

    @property
    def semantic_classes(self) -> tuple[str, ...]:
        """Names of the classes of the semantic maps, () if there are no maps or their classes have no names."""

    @property
    def fingerprint(self) -> str:
        """Changes when the data changes; the latent cache's header holds it. May take time when first asked."""

    def __len__(self) -> int: ...

    def size(self, index: int) -> tuple[int, int]:
        """Width and height of the image of sample `index`, without decoding it. Raises `BadSample`."""

    def read(self, index: int, *, with_image: bool = True) -> Sample:
        """Sample `index` (0 <= index < len). Without the image nothing of it is decoded. Raises `BadSample`."""


@dataclass(frozen=True)
class Batch:
    """Samples of one micro-batch of one rank, B of them. What the data does not have is None."""

    keys: tuple[str, ...]
    positions: tuple[int, ...]
    """Place of each sample in the global batch: random numbers are drawn for (seed, step, position)."""
    captions: tuple[str, ...]
    """One of each sample's captions. Text dropout is not applied here."""
    images: Tensor | None = None
    """float32 [B, 3, H, W] in [-1, 1]; None when moments are read instead."""
    semantic: Tensor | None = None
    """int64 [B, H, W], class indices, 255 = unknown."""
    masks: Tensor | None = None
    """float32 [B, 1, H, W] in [0, 1], 1 = repaint."""
    labels: Tensor | None = None
    """int64 [B], -1 = unknown."""
    weights: Tensor | None = None
    """float32 [B], factor of each sample's loss; None where all are 1."""
    moments: tuple[Tensor, Tensor] | None = None
    """Mean and log-variance of the cached posterior, each float32 [B, C, h, w]."""
    bad: tuple[tuple[str, str], ...] = ()
    """(key, reason) of every sample that could not be used and was replaced in this batch."""

    def __len__(self) -> int:
        return len(self.keys)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The same batch with its tensors on `device`."""

        def move(value: Any) -> Any:
            return value.to(device, non_blocking=non_blocking)

        moved: dict[str, Any] = {
            name: move(getattr(self, name))
            for name in ("images", "semantic", "masks", "labels", "weights")
            if getattr(self, name) is not None
        }
        if self.moments is not None:
            moved["moments"] = (move(self.moments[0]), move(self.moments[1]))
        return replace(self, **moved)

    def pin_memory(self) -> Batch:
        """Called by torch's DataLoader where `pin_memory` is set: copies to a GPU then overlap with its work."""
        pinned: dict[str, Any] = {}
        for part in fields(self):
            value = getattr(self, part.name)
            if hasattr(value, "pin_memory"):
                pinned[part.name] = value.pin_memory()
        if self.moments is not None:
            pinned["moments"] = (self.moments[0].pin_memory(), self.moments[1].pin_memory())
        return replace(self, **pinned)

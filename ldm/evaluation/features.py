"""Images to features: what every extractor offers, how images reach it, and the features of a whole set.

Images are rounded to 8 bits first, as they would be saved, then brought to the extractor's side by one fixed filter:
torch's antialiased bicubic. It is the same kernel as Pillow's bicubic (a = -0.5, widened when reducing), but on
floating-point values, where Pillow rounds to 8 bits after each direction; the two differ by about one step of 255.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.errors import UserError
from ldm.evaluation.measurement import check_count
from ldm.evaluation.reconstruction import as_saved

RESIZE_FILTER = "bicubic antialiased (torch)"
NOT_RESIZED = "none"


@dataclass(frozen=True)
class Features:
    """What an extractor sees in n images, float32 on the CPU."""

    pooled: Tensor
    """[n, D]: FID, KID, precision and recall, copying."""
    spatial: Tensor | None = None
    """[n, S]: sFID. None where the extractor has no such layer."""
    logits: Tensor | None = None
    """[n, K]: Inception score. None where the extractor is no classifier."""


class SeenThrough(Protocol):
    """What every figure must tell of the network, or the measurement, that images are seen through."""

    @property
    def name(self) -> str:
        """Which network, such as `inception-v3`."""

    @property
    def weights(self) -> str:
        """16 hex digits that change with any weight."""

    @property
    def resolution(self) -> int:
        """Side in pixels that images are brought to."""

    @property
    def resize_filter(self) -> str:
        """How: `RESIZE_FILTER` or `NOT_RESIZED`."""


class FeatureExtractor(SeenThrough, Protocol):
    """A frozen network, or a measurement, that turns images into features."""

    def extract(self, images: Tensor) -> Features:
        """Images [B, 3, H, W] in [-1, 1] of any size -> features of B rows."""


@dataclass(frozen=True)
class FeatureSet:
    """The features of a set of images, and through what they were seen."""

    features: Features
    resolution: int
    """Side of the images in pixels, before they were resized for the extractor."""
    extractor: str
    weights: str
    extractor_resolution: int
    resize_filter: str

    def __len__(self) -> int:
        return len(self.features.pooled)

    @property
    def seen_through(self) -> str:
        """`inception-v3 at 299 px (weights 0123456789abcdef)`."""
        return f"{self.extractor} at {self.extractor_resolution} px (weights {self.weights})"


def resized(images: Tensor, side: int) -> Tensor:
    """Images [B, 3, H, W] in [-1, 1] -> [B, 3, side, side] in [0, 1] by `RESIZE_FILTER`, unless that is their size."""
    images = as_saved(images)
    if images.shape[-2:] == (side, side):
        return images
    return F.interpolate(images, size=(side, side), mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)


class FeatureGatherer:
    """The features of a set of images that comes batch by batch."""

    def __init__(self, extractor: FeatureExtractor, what: str = "images") -> None:
        self._extractor, self._what = extractor, what
        self._parts: list[Features] = []
        self._sizes: set[tuple[int, int]] = set()

    def add(self, images: Tensor) -> None:
        """The next images [B, 3, H, W] in [-1, 1]."""
        if len(images):
            self._sizes.add((images.shape[-1], images.shape[-2]))
            self._parts.append(self._extractor.extract(images))

    def result(self) -> FeatureSet:
        """Raises `UserError` without images, if their sizes differ, or if a feature is not finite."""
        extractor, what = self._extractor, self._what
        check_count(f"set of {what}", sum(len(part.pooled) for part in self._parts), 1, "features")
        if len(self._sizes) > 1:
            found = ", ".join(f"{width} x {height}" for width, height in sorted(self._sizes))
            raise UserError(f"{what}: found sizes {found}; allowed is one size for all; crop or resize them alike")
        features = Features(
            torch.cat([part.pooled for part in self._parts]),
            _joined([part.spatial for part in self._parts]),
            _joined([part.logits for part in self._parts]),
        )
        if not features.pooled.isfinite().all():
            raise UserError(f"{what}: {extractor.name} gives NaN or Inf; compute it in fp32, or check the images")
        resolution = max(next(iter(self._sizes)))
        seen = (extractor.name, extractor.weights, extractor.resolution, extractor.resize_filter)
        return FeatureSet(features, resolution, *seen)


def extract_features(extractor: FeatureExtractor, batches: Iterable[Tensor], what: str = "images") -> FeatureSet:
    """The features of all images in `batches`, each [B, 3, H, W] in [-1, 1]. Raises what `FeatureGatherer` does."""
    gatherer = FeatureGatherer(extractor, what)
    for images in batches:
        gatherer.add(images)
    return gatherer.result()


def _joined(parts: list[Tensor | None]) -> Tensor | None:
    present = [part for part in parts if part is not None]
    return torch.cat(present) if len(present) == len(parts) else None


def module_hash(module: nn.Module) -> str:
    """16 hex digits of all weights and buffers of a network."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]

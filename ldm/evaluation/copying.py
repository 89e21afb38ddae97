"""Do samples copy training images? Distances to the nearest ones, compared with what unseen images have.

For every picture two scores, each the sum of the logarithms over pixel and feature space, so that both count: the
distance d1 to its nearest training image (finds images that the training set holds many times), and d1 over the mean
distance of the next ten (finds a copy in a crowd of similar images; as arXiv 2301.13188, section 4.2). A score's
p-value is the share of held-out images at least as extreme; a picture is flagged if the smaller of its two p-values is
below what 99 % of the held-out images have. So 1 % of fresh pictures are flagged, whatever data and features (a
conformal test), if the held-out set is of the same kind as the training set and not part of it.

What a check cannot see it must say: some training images, slightly altered, are checked too, and the share of these
planted copies that is flagged is reported. Where held-out images are themselves near-duplicates of training images, as
in data of few possible pictures, it is low, and the check tells nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ldm.evaluation.bootstrap import wilson_interval
from ldm.evaluation.distances import Nearest
from ldm.evaluation.features import FeatureExtractor, extract_features, resized
from ldm.evaluation.measurement import Estimate, check_count
from ldm.evaluation.reconstruction import as_saved
from ldm.randomness import normal_for_each

FALSE_ALARMS = 0.01
"""Share of fresh pictures that are flagged."""
LEAST_HELD_OUT = 100
"""With fewer held-out images no picture could be among the nearest 1 %."""
LEAST_TRAINING = 3
PIXEL_SIDE = 32
"""Pixel space: pictures reduced to this side, so that noise and a shift by a fraction of a pixel weigh little."""
NEXT = 10
"""Neighbours after the nearest that it is compared with."""
BLIND = 0.5
"""Share of planted copies below which a clean result means nothing."""
_LEAST_DISTANCE = 1e-9

Through = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Pair:
    """A sample and the training image nearest to it in pixel space."""

    sample: int
    training: int
    pixel_distance: float
    """Root of the mean squared difference, images in 0..255 at 32 px."""
    feature_distance: float
    """To the nearest training image in feature space, mostly the same one."""
    flagged: bool


@dataclass(frozen=True)
class CopyingReport:
    """What the check found. `pairs` are all samples, the most suspicious first."""

    flagged: Estimate
    """Share of the samples, with Wilson's interval."""
    planted: float
    """Share of slightly altered training images that the check flags: what it can see."""
    nearer: float
    """Chance that a sample is nearer to its nearest training image than a held-out image is to its own; 0.5 = alike."""
    pairs: tuple[Pair, ...]
    n: int
    held_out: int
    training: int
    extractor: str
    resize_filter: str

    @property
    def copies(self) -> bool | None:
        """True: more samples are flagged than fresh images would be. None: the check cannot tell."""
        if self.flagged.low is not None and self.flagged.low > FALSE_ALARMS:
            return True
        return None if self.planted < BLIND else False

    def verdict(self) -> str:
        """One line for a reader."""
        words = {
            True: "COPIES of training images",
            False: "no sign of copying",
            None: "CANNOT TELL: unseen images are as near to training images as copies would be",
        }[self.copies]
        low, high = (100 * (value or 0.0) for value in (self.flagged.low, self.flagged.high))
        return (
            f"{words}: {100 * self.flagged.value:.1f} % of {self.n} samples [{low:.1f}, {high:.1f}] are as near to a "
            f"training image as only {100 * FALSE_ALARMS:.0f} % of {self.held_out} held-out images are; of planted "
            f"copies it finds {100 * self.planted:.0f} %; a sample is nearer than a held-out image with chance "
            f"{self.nearer:.2f} (0.5 = alike); {self.training} training images, {self.extractor}"
        )


class CopyingCheck:
    """Holds samples, held-out and planted images; the training images stream past in batches, in constant memory."""

    def __init__(
        self,
        extractor: FeatureExtractor,
        *,
        samples: Iterable[Tensor],
        held_out: Iterable[Tensor],
        planted: Iterable[Tensor],
        through: Through | None = None,
        seed: int = 0,
    ) -> None:
        """Batches of images [B, 3, H, W] in [-1, 1].

        Args:
            samples: what the model drew.
            held_out: images of the same kind as the training set's that are not in it, at least 100.
            planted: some training images, a hundred or so; they are altered here.
            through: applied to held-out, planted and training images: the autoencoder's reconstruction. The model can
                copy no more of an image than that, and a held-out image has then the same blur as a sample.

        Raises `UserError` for too few images.
        """
        self._extractor = extractor
        self._through = through or (lambda images: images)
        parts = {
            "samples": (images for images in samples),
            "held-out images": (self._through(images) for images in held_out),
            "training images": _altered(map(self._through, planted), seed),
        }
        views = {name: self._views(batches, name) for name, batches in parts.items()}
        self._counts = [len(pixels) for pixels, _ in views.values()]
        check_count("held-out set", self._counts[1], LEAST_HELD_OUT, "copying check")
        pixels, features = (torch.cat(each) for each in zip(*views.values(), strict=True))
        self._spaces = (Nearest(pixels, NEXT + 1), Nearest(features, NEXT + 1))

    def add(self, images: Tensor) -> None:
        """The next batch of training images [B, 3, H, W] in [-1, 1]; they are numbered in this order."""
        views = self._views([self._through(images)], "training images")
        for space, rows in zip(self._spaces, views, strict=True):
            space.add(rows)

    def result(self) -> CopyingReport:
        """Compare. Raises `UserError` for fewer than three training images."""
        check_count("training set", self._spaces[0].seen, LEAST_TRAINING, "copying check")
        nearest, relative = _scores(self._spaces)
        samples, held_out, planted = torch.stack([nearest, relative], dim=1).split(self._counts)  # each [n, 2]
        flags = _flags(held_out, samples)
        low, high = wilson_interval(int(flags.sum()), len(flags))
        nearer = (samples[:, :1] < held_out[:, 0]).double() + 0.5 * (samples[:, :1] == held_out[:, 0]).double()
        return CopyingReport(
            flagged=Estimate(flags.double().mean().item(), low, high),
            planted=_flags(held_out, planted).double().mean().item(),
            nearer=nearer.mean().item(),
            pairs=self._pairs(samples.sum(1), flags),
            n=self._counts[0],
            held_out=self._counts[1],
            training=self._spaces[0].seen,
            extractor=f"{self._extractor.name} at {self._extractor.resolution} px (weights {self._extractor.weights})",
            resize_filter=self._extractor.resize_filter,
        )

    def _views(self, batches: Iterable[Tensor], what: str) -> tuple[Tensor, Tensor]:
        """Rows in pixel space [n, 3 * 32 * 32] and in feature space [n, D]."""
        pixels: list[Tensor] = []

        def seen() -> Iterable[Tensor]:
            for images in batches:
                pixels.append(resized(images, PIXEL_SIDE).flatten(1).cpu())
                yield images

        features = extract_features(self._extractor, seen(), what).features.pooled
        return torch.cat(pixels), features

    def _pairs(self, suspicion: Tensor, flags: Tensor) -> tuple[Pair, ...]:
        pixels, features = self._spaces
        scale = 255 / (3 * PIXEL_SIDE**2) ** 0.5
        return tuple(
            Pair(
                sample=i,
                training=int(pixels.indices[i, 0]),
                pixel_distance=scale * pixels.squares[i, 0].sqrt().item(),
                feature_distance=features.squares[i, 0].sqrt().item(),
                flagged=bool(flags[i]),
            )
            for i in sorted(range(len(flags)), key=lambda i: (not flags[i], suspicion[i].item(), i))
        )


def _altered(batches: Iterable[Tensor], seed: int) -> Iterator[Tensor]:
    count = 0
    for images in batches:
        yield slightly_altered(images, range(count, count + len(images)), seed)
        count += len(images)


def slightly_altered(images: Tensor, numbers: Sequence[int], seed: int) -> Tensor:
    """Copies as a model would make them, [B, 3, H, W] in [-1, 1]: a little blur, noise of 3/255, 8 bits.

    The noise depends on (seed, the image's number) alone.
    """
    kernel = torch.tensor([0.1, 0.8, 0.1]).to(images)
    kernel = torch.outer(kernel, kernel).expand(3, 1, 3, 3)
    blurred = F.conv2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), kernel, groups=3)
    noise = normal_for_each(numbers, images.shape[1:], seed, "planted copy").to(images)
    return as_saved(blurred + noise * (2 * 3 / 255)) * 2 - 1


def _scores(spaces: Iterable[Nearest]) -> tuple[Tensor, Tensor]:
    """log d1 and log d1 / mean of the next ones, summed over the spaces, each [q]; lower is more suspicious."""
    nearest, relative = torch.zeros(()), torch.zeros(())
    for space in spaces:
        distances = space.squares.sqrt()  # [q, 1 + NEXT], infinite beyond the number of training images
        found = min(space.seen, distances.shape[1])
        distances = distances[:, :found].clamp_min(_LEAST_DISTANCE)
        nearest = nearest + distances[:, 0].log()
        relative = relative + (distances[:, 0] / distances[:, 1:].mean(1)).log()
    return nearest, relative


def _flags(held_out: Tensor, rows: Tensor) -> Tensor:
    """Which rows [n, 2] of scores are more extreme than 99 % of the held-out ones [m, 2]: bool [n].

    The smaller of two p-values is small more often than 1 time in 100, so it is ranked among the held-out images' own,
    each taken against the others.
    """
    count = len(held_out)
    own = torch.stack([_no_greater(column, column) / count for column in held_out.T]).min(0).values  # [m]
    found = torch.stack(
        [(1 + _no_greater(column, values)) / (1 + count) for column, values in zip(held_out.T, rows.T, strict=True)]
    ).min(0)  # [n]
    return (1 + _no_greater(own, found.values)) / (1 + count) <= FALSE_ALARMS


def _no_greater(held_out: Tensor, values: Tensor) -> Tensor:
    """How many of the held-out values [m] are no greater than each of `values` [n]: [n]."""
    return torch.searchsorted(held_out.sort().values, values.contiguous(), right=True)

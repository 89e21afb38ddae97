"""Which sample stands where: a pure function of (seed, step, position), so a resume needs the step number alone."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Protocol

from ldm.data.buckets import Buckets, Size
from ldm.randomness import derive_seed, permuted_index


class Order(Protocol):
    """The samples of every global batch. `step` and `position` count from 0."""

    def sample_at(self, step: int, position: int) -> tuple[int, int]:
        """(epoch, index) of the sample at `position` of the global batch of `step`."""

    def replacement_for(self, step: int, index: int, epoch: int, attempt: int) -> int:
        """The sample that stands in for the unusable sample `index`; `attempt` counts the stand-ins tried before."""

    def size_at(self, step: int) -> Size:
        """Width and height of all images of the global batch."""


@dataclass(frozen=True)
class SquareOrder:
    """All images have one shape.

    Samples are counted through all steps; every `length` of them make an epoch, which visits each sample exactly once
    in an order of its own. A batch may span two epochs.
    """

    length: int
    batch_size: int
    seed: int
    resolution: int

    def sample_at(self, step: int, position: int) -> tuple[int, int]:
        """See `Order`."""
        epoch, place = divmod(step * self.batch_size + position, self.length)
        return epoch, permuted_index(place, self.length, self.seed, "order", epoch)

    def replacement_for(self, step: int, index: int, epoch: int, attempt: int) -> int:
        """Any sample."""
        return derive_seed(self.seed, "replacement", epoch, index, attempt) % self.length

    def size_at(self, step: int) -> Size:
        """The square."""
        return self.resolution, self.resolution


@dataclass(frozen=True)
class BucketOrder:
    """Each global batch is of one bucket.

    In every epoch the samples of each bucket are permuted and cut into batches, and the batches of all buckets are
    permuted. The last batch of a bucket is filled up from the beginning of the bucket's own permutation: so an epoch
    visits each sample at least once, and some a second time, others in the next epoch. A bucket that is smaller than a
    batch repeats its samples within the batch. An epoch has as many steps as there are such batches.
    """

    buckets: Buckets
    batch_size: int
    seed: int
    one_shape_each: bool = False
    """Whether a sample is there in the shape of its bucket only, as in a latent cache."""

    @cached_property
    def _batches(self) -> list[int]:
        """The number of batches of an epoch before those of each bucket, and of all."""
        counts = [-(-self.buckets.count(bucket) // self.batch_size) for bucket in range(len(self.buckets.sizes))]
        return [0, *accumulate(counts)]

    @property
    def steps_per_epoch(self) -> int:
        """How many batches an epoch has."""
        return self._batches[-1]

    def _batch(self, step: int) -> tuple[int, int, int]:
        """Epoch, bucket, and the number of the batch in its bucket."""
        epoch, turn = divmod(step, self.steps_per_epoch)
        batch = permuted_index(turn, self.steps_per_epoch, self.seed, "batches", epoch)
        bucket = bisect_right(self._batches, batch) - 1
        return epoch, bucket, batch - self._batches[bucket]

    def sample_at(self, step: int, position: int) -> tuple[int, int]:
        """See `Order`."""
        epoch, bucket, batch = self._batch(step)
        count = self.buckets.count(bucket)
        place = (batch * self.batch_size + position) % count
        return epoch, self._member(bucket, permuted_index(place, count, self.seed, "order", epoch, bucket))

    def replacement_for(self, step: int, index: int, epoch: int, attempt: int) -> int:
        """The samples of the bucket in turn, so that one that can be used is found; after them, any that fits."""
        _, bucket, _ = self._batch(step)
        count = self.buckets.count(bucket)
        if attempt < count or self.one_shape_each:
            place = permuted_index(attempt % count, count, self.seed, "replacement", epoch, index)
            return self._member(bucket, place)
        return derive_seed(self.seed, "replacement", epoch, index, attempt) % len(self.buckets)

    def size_at(self, step: int) -> Size:
        """That of the batch's bucket."""
        return self.buckets.sizes[self._batch(step)[1]]

    def _member(self, bucket: int, number: int) -> int:
        return self.buckets.index(self.buckets.starts[bucket] + number)

"""Which sample stands where: a pure function of (seed, step, position), so a resume needs the step number alone."""

from __future__ import annotations

from ldm.randomness import derive_seed, permuted_index


def sample_at(step: int, position: int, batch_size: int, length: int, seed: int) -> tuple[int, int]:
    """(epoch, index) of the sample at `position` of the global batch of `step`.

    Samples are counted through all steps; every `length` of them make an epoch, which visits each sample exactly once
    in an order of its own. A batch may span two epochs. `step` and `position` count from 0.
    """
    epoch, place = divmod(step * batch_size + position, length)
    return epoch, permuted_index(place, length, seed, "order", epoch)


def replacement_for(index: int, epoch: int, attempt: int, length: int, seed: int) -> int:
    """The sample that stands in for the unusable sample `index`; `attempt` counts the stand-ins tried before."""
    return derive_seed(seed, "replacement", epoch, index, attempt) % length

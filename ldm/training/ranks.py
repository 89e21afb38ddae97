"""Several processes train one model: that all hold the same weights, and what a change of their number changes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor

from ldm.errors import UserError

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Trained(Protocol):
    """A learner, as far as it is compared."""

    name: str

    def tensors(self) -> Mapping[str, Mapping[str, Tensor]]: ...


def weights_of(learners: Sequence[Trained]) -> dict[str, Tensor]:
    """The trained weights by learner and name."""
    return {f"{one.name}: {name}": weight for one in learners for name, weight in one.tensors()[one.name].items()}


def compare_processes(tensors: Mapping[str, Tensor], step: int, accelerator: Accelerator) -> None:
    """Raise `UserError`, on every process alike, unless all hold the same bits after `step` updates.

    One number of each process is exchanged, and one of each tensor only after a difference. The sum of a tensor's bits
    is exact whatever its strides; it does not see numbers that have changed places.
    """
    if accelerator.num_processes == 1 or not tensors:
        return
    sums = torch.stack([_sum_of_bits(tensor).to(accelerator.device) for tensor in tensors.values()])  # int64 [P]
    # Times odd numbers, so that a difference in one tensor cannot be made up by another's.
    factors = 2 * torch.arange(len(sums), device=sums.device) + 1
    totals = accelerator.gather((sums * factors).sum().reshape(1))  # [processes]; it may wrap round, alike everywhere
    if bool((totals == totals[0]).all()):
        return
    everywhere = accelerator.gather(sums[None])  # [processes, P]
    usual = everywhere.mode(dim=0).values  # [P]
    process, place = (int(number) for number in (everywhere != usual).nonzero()[0])
    other = int((everywhere == usual)[:, place].nonzero()[0])  # of two processes nobody knows which is right
    name, count = list(tensors)[place], int((everywhere != usual).any(dim=0).sum())
    raise UserError(
        f"step {step}: the processes have diverged: {name} of process {process} is not that of process {other} "
        f"({count} of {len(tensors)} tensors differ); nothing was saved since the last checkpoint, from which the "
        "same command goes on; if it happens again, suspect the memory or the device of one of them"
    )


def _sum_of_bits(tensor: Tensor) -> Tensor:
    return tensor.detach().view(_INTEGERS[tensor.element_size()]).sum(dtype=torch.int64)


@contextmanager
def told_once(accelerator: Accelerator) -> Iterator[None]:
    """Inside, the loss of another process is one line: what happened is told by that process, and by its launcher."""
    try:
        yield
    except RuntimeError as error:
        # gloo has no error of its own; of nccl's and the store's the class says it.
        lost = isinstance(error, torch.distributed.DistError) or "gloo" in str(error)
        if accelerator.num_processes == 1 or not lost:
            raise
        raise UserError(
            f"process {accelerator.process_index} of {accelerator.num_processes} stops, as another one has ended; the "
            "reason is what that one said; the same command goes on from the last checkpoint"
        ) from error


def other_processes(state: Mapping[str, Any], processes: int) -> str | None:
    """What is not bit for bit the same when a checkpoint with this state is gone on with by so many processes."""
    before = int(state.get("processes", processes))
    if before == processes:
        return None
    return (
        f"the checkpoint is of {before} process{'es' * (before > 1)}, now there {'is' if processes == 1 else 'are'} "
        f"{processes}: samples, their order and all random numbers stay the same; sums over a batch are rounded in "
        "another order, so losses and weights agree to about 1e-5 and not bit for bit"
    )

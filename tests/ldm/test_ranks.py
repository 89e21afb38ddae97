"""Weights are compared across processes by their bits. Threads stand in for processes here."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from ldm.errors import UserError
from ldm.training.ranks import compare_processes, other_processes, told_once


class Together:
    """What `compare_processes` uses of an accelerator, for several threads."""

    device = torch.device("cpu")

    def __init__(self, count: int) -> None:
        self.num_processes, self.process_index = count, 0
        self._barrier, self._given = threading.Barrier(count), dict[int, Tensor]()
        self.gathered = 0

    def gather(self, tensor: Tensor) -> Tensor:
        self._given[int(threading.current_thread().name)] = tensor
        if self._barrier.wait() == 0:
            self.gathered += tensor.numel()
        everything = torch.cat([self._given[index] for index in range(self.num_processes)])
        self._barrier.wait()
        return everything


def compare(each: Sequence[dict[str, Tensor]]) -> tuple[list[str | None], int]:
    """What each process is told, and how many numbers each has given."""
    together = Together(len(each))

    def one(index: int) -> str | None:
        threading.current_thread().name = str(index)
        try:
            compare_processes(each[index], 7, together)  # type: ignore[arg-type]
        except UserError as error:
            return str(error)
        return None

    with ThreadPoolExecutor(len(each)) as pool:
        return list(pool.map(one, range(len(each)))), together.gathered


def weights() -> dict[str, Tensor]:
    return {
        "unet: a": torch.linspace(-1, 1, 48).reshape(2, 3, 2, 4),
        "unet: b": torch.full((), torch.nan),
        "half": torch.ones(3, dtype=torch.float16),
        "count": torch.tensor(5),
    }


def test_equal_weights_pass_whatever_their_strides_for_one_number() -> None:
    other = weights()
    other["unet: a"] = other["unet: a"].contiguous(memory_format=torch.channels_last)
    assert compare([weights(), other, weights()]) == ([None] * 3, 1)


@pytest.mark.parametrize(("name", "place"), [("unet: a", 17), ("unet: b", 0), ("half", 2), ("count", 0)])
def test_one_bit_is_seen_and_named_on_every_process(name: str, place: int) -> None:
    broken = weights()
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[broken[name].element_size()]
    broken[name].view(integers).view(-1)[place] ^= 1
    told, numbers = compare([weights(), weights(), broken])
    assert numbers == 1 + len(broken)
    assert len(set(told)) == 1
    assert told[0] is not None and "\n" not in told[0]
    assert f"step 7: the processes have diverged: {name} of process 2 is not that of process 0" in told[0]
    assert "(1 of 4 tensors differ)" in told[0]


def test_differences_do_not_make_up_for_each_other() -> None:
    first, second = {"a": torch.tensor(1), "b": torch.tensor(2)}, {"a": torch.tensor(2), "b": torch.tensor(1)}
    told, _ = compare([first, second])
    assert told[0] is not None and "(2 of 2 tensors differ)" in told[0]


def test_one_process_compares_nothing() -> None:
    assert compare([weights()]) == ([None], 0)


def test_the_loss_of_another_process_is_one_line_and_other_errors_stay() -> None:
    two = Together(2)
    with pytest.raises(UserError, match="process 0 of 2 stops, as another one has ended") as error, told_once(two):  # type: ignore[arg-type]
        raise RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer")
    assert "\n" not in str(error.value)
    with pytest.raises(RuntimeError, match="shapes"), told_once(two):  # type: ignore[arg-type]
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    with pytest.raises(RuntimeError, match="gloo"), told_once(Together(1)):  # type: ignore[arg-type]
        raise RuntimeError("gloo")


def test_a_change_of_the_number_of_processes_says_what_is_not_bit_exact() -> None:
    assert other_processes({"processes": 2}, 2) is None
    assert other_processes({}, 3) is None
    note = other_processes({"processes": 2}, 1)
    assert note is not None and note.startswith(
        "the checkpoint is of 2 processes, now there is 1: samples, their order"
    )
    assert "not bit for bit" in note

"""kill -9 at every file operation: what lies under its final name is the old state or the new one, never a mixture.

A child process is killed at its first file operation, another one at its second, and so on until one comes through.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import pytest
import torch

from ldm import files
from ldm.files import whole_folder, write_text
from ldm.training.checkpoint import CheckpointFolder
from ldm.training.tracking import MetricsLog
from ldm.training.watch import Watch

FILE_OPERATIONS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "os.link", "shutil.rmtree")
"""Python's audit events (PEP 578) of calls that may change files; fsync and the exchange of names have none."""


def killed_at(number: int, action: Callable[[], object]) -> bool:
    """Run `action` in a child that is killed before its file operation `number` (from 0); whether it came so far."""
    child = os.fork()
    if child == 0:
        left = number

        def operation(event: str, *_: object) -> None:
            nonlocal left
            if event not in FILE_OPERATIONS:
                return
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1

        sync, exchange = files.sync, files._exchange
        files.sync = lambda path: (operation("open"), sync(path))[1]
        files._exchange = lambda one, other: (operation("os.rename"), exchange(one, other))[1]
        sys.addaudithook(lambda event, _: operation(event))
        try:
            action()
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


@dataclass
class Case:
    """Something that is written over an older state."""

    write: Callable[[str], object]
    """Write the state "old" or "new"."""
    read: Callable[[], str]
    """The state as its reader sees it."""


def tensors(state: str) -> dict[str, dict[str, torch.Tensor]]:
    return {name: {"weight": torch.full((64,), float(state == "new"))} for name in ("unet", "unet.ema", "optimiser")}


def checkpoints(folder: Path) -> Case:
    place = CheckpointFolder(folder, keep=1)

    def read() -> str:
        found = place.latest()
        step, values = found.step, {part["weight"].mean().item() for part in found.tensors.values()}
        assert values == {float(step == 2)}
        return "new" if step == 2 else "old"

    return Case(lambda state: place.save(2 if state == "new" else 1, tensors(state), {}), read)


def best_checkpoints(folder: Path) -> Case:
    def watch() -> Watch:
        return Watch(folder, every=1, metric="psnr")

    def write(state: str) -> None:
        one = watch()
        one._numbers = {"psnr": float(state == "new")}
        one.keep(2 if state == "new" else 1, tensors(state), {})

    def read() -> str:
        best = watch().best()
        assert best is not None
        return "new" if best.step == 2 else "old"

    return Case(write, read)


def text_files(folder: Path) -> Case:
    path = folder / "report.json"
    return Case(
        lambda state: write_text(path, json.dumps({"state": state})), lambda: json.loads(path.read_text())["state"]
    )


def folders(folder: Path) -> Case:
    place = folder / "pipeline"

    def write(state: str) -> None:
        with whole_folder(place) as partial:
            (partial / "unet").mkdir()
            for name in ("unet/weights", "index"):
                (partial / name).write_text(state)

    def read() -> str:
        states = {(place / name).read_text() for name in ("unet/weights", "index")}
        assert len(states) == 1
        return states.pop()

    return Case(write, read)


def loss_logs(folder: Path) -> Case:
    path = folder / "metrics.jsonl"

    def write(state: str) -> None:
        if state == "old":
            path.write_text("".join(f'{{"step": {step}}}\n' for step in range(50)))
        else:
            MetricsLog(path, start_step=20).close()

    def read() -> str:
        steps = [json.loads(line)["step"] for line in path.read_text().splitlines()]
        assert steps in (list(range(50)), list(range(20)))
        return "old" if len(steps) == 50 else "new"

    return Case(write, read)


@pytest.mark.parametrize(
    "make", [checkpoints, pytest.param(best_checkpoints, marks=pytest.mark.slow), text_files, folders, loss_logs]
)
def test_killed_at_every_file_operation(
    make: Callable[[Path], Case], tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    seen: set[str] = set()
    for number in count():
        place = tmp_path / str(number)
        place.mkdir()
        case = make(place)
        case.write("old")
        killed = killed_at(number, lambda case=case: case.write("new"))
        seen.add(case.read())
        case.write("new")  # the one that comes after finds nothing in its way
        assert case.read() == "new"
        if not killed:
            break
    assert seen == {"old", "new"}
    assert number > 3
    record_property("killed", number)
    print(f"{make.__name__}: killed at each of {number} file operations")

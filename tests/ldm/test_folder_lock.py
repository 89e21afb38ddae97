from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ldm.errors import UserError
from ldm.training.folder_lock import lock_folder


@contextmanager
def owner(folder: Path) -> Iterator[tuple[int, int]]:
    """Another process that has the folder, and a child of its own, as a worker is, that outlives it."""
    ready, tell = os.pipe()
    process = os.fork()
    if process == 0:
        lock = lock_folder(folder)
        worker = os.fork()
        if worker:
            os.write(tell, worker.to_bytes(4))
        signal.pause()
        lock.close()
    worker = int.from_bytes(os.read(ready, 4))
    try:
        yield process, worker
    finally:
        os.kill(worker, signal.SIGKILL)


def test_a_second_run_is_refused_until_the_first_is_gone(tmp_path: Path) -> None:
    with owner(tmp_path) as (process, worker):
        refusal = rf"process {process} is training in this folder; allowed is one run a folder"
        with pytest.raises(UserError, match=refusal):
            lock_folder(tmp_path)
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        os.kill(worker, 0)  # it lives, and does not keep the lock
        lock_folder(tmp_path).close()


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be written: No such file or directory"):
        lock_folder(tmp_path / "none")

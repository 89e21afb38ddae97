"""The run folder's loss log: `metrics.jsonl` (the record) and accelerate's trackers (the view)."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from accelerate import Accelerator

from ldm.errors import UserError
from ldm.files import write_text, writing


class MetricsLog:
    """One JSON object a line. On resume, rows from `start_step` on are cut off, so that a run that was killed leaves
    the same rows as one that was not. Raises `UserError` if the disk refuses; the rows before are there."""

    def __init__(self, path: Path, start_step: int) -> None:
        self.path = path
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists():
                rows = [line for line in path.read_text(encoding="utf-8").splitlines() if _before(line, start_step)]
                write_text(path, "".join(f"{row}\n" for row in rows))
            self._file = path.open("a", encoding="utf-8")

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Append the row of update number `step` (from 0)."""
        with writing(self.path):
            self._file.write(json.dumps({"step": step, **values}) + "\n")
            self._file.flush()

    def close(self) -> None:
        with writing(self.path):
            self._file.close()


class Tracking:
    """Sends numbers and pictures where the user watches them. On processes other than the first it does nothing.

    Leave it as a context manager. Raises `UserError` if the disk refuses.
    """

    def __init__(self, accelerator: Accelerator, run_folder: Path, start_step: int) -> None:
        self._accelerator = accelerator
        self._log = MetricsLog(run_folder / "metrics.jsonl", start_step) if accelerator.is_main_process else None
        self._folder = run_folder / "logs"
        self._hook = threading.excepthook
        threading.excepthook = self._thread_failed
        with ExitStack() as after_failure:
            after_failure.callback(self._restore_hook)
            if accelerator.log_with:
                with writing(self._folder):
                    accelerator.init_trackers("logs", init_kwargs={"tensorboard": {"purge_step": start_step}})
            after_failure.pop_all()

    def __enter__(self) -> Tracking:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
            return
        with suppress(UserError):  # a full disk refuses this too, and what it refused first is what is told
            self.close()

    def numbers(self, step: int, values: Mapping[str, float], timings: Mapping[str, float] | None = None) -> None:
        """Log `values`, which depend on nothing but config and data, and `timings`, which vary from run to run."""
        if self._log is None:
            return
        self._log.write(step, {**values, **({"timing": dict(timings)} if timings else {})})
        with writing(self._folder):
            self._accelerator.log({**values, **(timings or {})}, step=step)

    def picture(self, step: int, name: str, pixels: np.ndarray) -> None:
        """Show `pixels`, uint8 [H, W, 3], under `name`."""
        for tracker in self._accelerator.trackers if self._log is not None else ():
            if tracker.name == "tensorboard":
                with writing(self._folder):
                    tracker.log_images({name: pixels[None]}, step=step, dataformats="NHWC")

    def close(self) -> None:
        try:
            if self._log is not None:
                self._log.close()
            # Not `end_training`: it also parts the processes, which have the report and the saved model ahead of them.
            for tracker in self._accelerator.trackers:
                with writing(self._folder):
                    tracker.finish()
        finally:
            self._restore_hook()

    def _restore_hook(self) -> None:
        threading.excepthook = self._hook

    def _thread_failed(self, failed: threading.ExceptHookArgs) -> None:
        """TensorBoard writes from a thread of its own; what fails there is raised again here, so it is told once."""
        if not issubclass(failed.exc_type, OSError):
            self._hook(failed)


def _before(line: str, step: int) -> bool:
    """Whether a row belongs to an update before `step`; a line that a kill cut short does not."""
    try:
        return json.loads(line)["step"] < step
    except (ValueError, KeyError, TypeError):
        return False

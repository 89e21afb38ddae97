"""What a run leaves behind when a step is not finite: `RUN/failure/step-N/`, from which that very step is done again.

All randomness is a function of seed, step and position (DESIGN.md 5), so the last checkpoint, the config and these two
numbers are the whole state; the bundle holds names and plain values, a few kilobytes.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from accelerate.utils import gather_object

from ldm.errors import UserError, user_input
from ldm.files import whole_folder
from ldm.training.checkpoint import CheckpointFolder
from ldm.training.finite import BatchSample, NotFinite
from ldm.training.run import Run

FAILURE, CONFIG, FOLDER = "failure.json", "config.yaml", "failure"
FORMAT = 1
_KEYS_SHOWN = 8


class Scripted(Protocol):
    """A stage that says which script trains it."""

    script: str


@dataclass(frozen=True)
class Failure:
    """A bundle that was read."""

    folder: Path
    step: int
    """The update (from 0) that could not be done."""
    values: dict[str, float]
    """What was not finite in it, by name."""
    samples: tuple[BatchSample, ...]
    checkpoint: Path | None
    """What the step is reached from; None: from the beginning."""
    processes: int
    precision: str

    @property
    def run_folder(self) -> Path:
        """The run that it happened in."""
        return self.folder.parent.parent

    @property
    def config(self) -> Path:
        """The run's resolved config."""
        return self.folder / CONFIG


@contextmanager
def bundled(stage: Scripted, run: Run) -> Iterator[None]:
    """Inside, a `NotFinite` becomes a bundle in the run folder and a `UserError` with the command that replays it."""
    try:
        yield
    except NotFinite as found:
        samples = gather_object(list(found.samples)) if run.accelerator.num_processes > 1 else list(found.samples)
        found = NotFinite(found.step, found.values, sorted(samples, key=lambda sample: sample.position))
        raise UserError(_told(found, stage, run)) from found


def open_failure(path: Path, script: str) -> Failure | None:
    """The bundle in the folder `path`; None if it is none, so that it will be a config. Raises `UserError`."""
    if not (path / FAILURE).is_file():
        return None
    folder = path.resolve()
    with user_input(str(path / FAILURE), OSError, ValueError, KeyError, TypeError):
        found = json.loads((path / FAILURE).read_text(encoding="utf-8"))
        if found["format"] != FORMAT:
            raise ValueError(f"found format {found['format']}; allowed is {FORMAT}; use the version that wrote it")
        failure = Failure(
            folder,
            int(found["step"]),
            {name: float(value) for name, value in found["not_finite"].items()},
            tuple(BatchSample(**sample) for sample in found["samples"]),
            None if found["checkpoint"] is None else folder.parent.parent / "checkpoints" / _step_name(found),
            int(found["processes"]),
            str(found["precision"]),
        )
    if found["script"] != script:
        raise UserError(f"{path}: it was written by {found['script']}; replay it with {found['script']} {path}")
    if failure.checkpoint is not None and not failure.checkpoint.is_dir():
        raise UserError(
            f"{path}: the step is reached from {failure.checkpoint}, which has gone; put the folder back to replay it; "
            "a run that goes on removes old checkpoints (training.keep_checkpoints)"
        )
    return failure


def _step_name(found: Mapping[str, Any]) -> str:
    return f"step-{int(found['checkpoint'])}"


def _told(found: NotFinite, stage: Scripted, run: Run) -> str:
    """The one line; the first process writes the bundle."""
    checkpoints = run.folder / "checkpoints"
    steps = [step for step in CheckpointFolder(checkpoints, keep=1).steps() if step <= found.step]
    last = steps[-1] if steps else None
    folder = run.folder / FOLDER / f"step-{found.step}"
    command = f"{'accelerate launch' if run.accelerator.num_processes > 1 else 'python'} {stage.script} {folder}"
    if run.accelerator.is_main_process:
        try:
            _write(folder, found, last, stage.script, command, run)
        except UserError as error:  # what was found first is what the user must hear of
            command = f"nothing, as the bundle is missing ({error})"
    keys = [sample.key for sample in found.samples]
    after = any("after the update" in name for name in found.values)
    stopped = "stopped before it was saved" if after else "stopped before the update"
    good = "there is no checkpoint yet" if last is None else f"the last checkpoint in {checkpoints} is good"
    return (
        f"{found}; {stopped}, {good}{'' if last is None else f' (step-{last})'}. Lower the learning rate or look at "
        f"this batch: {', '.join(keys[:_KEYS_SHOWN])}"
        + (f" and {len(keys) - _KEYS_SHOWN} more" if len(keys) > _KEYS_SHOWN else "")
        + f". What does the step again and says which sample it was: {command}"
    )


def _write(folder: Path, found: NotFinite, last: int | None, script: str, command: str, run: Run) -> None:
    with whole_folder(folder, ", the checkpoints are not touched") as partial:
        values = {
            "format": FORMAT,
            "script": script,
            "step": found.step,
            "seed": run.seed,  # with the step and a sample's position, all there is of random state
            "not_finite": {name: _spelt(value) for name, value in found.values.items()},
            "checkpoint": last,
            "processes": run.accelerator.num_processes,
            "precision": run.accelerator.mixed_precision,
            "device": run.accelerator.device.type,
            "command": command,
            "samples": [asdict(sample) for sample in found.samples],
        }
        (partial / FAILURE).write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
        if (run.folder / CONFIG).exists():
            shutil.copyfile(run.folder / CONFIG, partial / CONFIG)


def _spelt(value: float) -> str:
    """JSON has no NaN."""
    return "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"

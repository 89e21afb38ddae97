"""The training loop that both stages share: batches -> backward -> checked update -> log, validate, checkpoint."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import Tensor
from tqdm import tqdm

from ldm.data.buckets import Buckets
from ldm.data.combined import distinct_length
from ldm.data.loader import NOTHING, LatentReader, TrainingBatches, Wanted, dead_worker_told
from ldm.data.quarantine import Quarantine
from ldm.data.sample import Batch, Source
from ldm.data.sources import DataConfig
from ldm.training.alarms import Alarms
from ldm.training.checkpoint import Checkpoint, CheckpointFolder
from ldm.training.failure import bundled
from ldm.training.finite import (
    BatchSample,
    NotFinite,
    broken_files,
    broken_values,
    floating_tensors,
    probe,
    samples_of,
)
from ldm.training.learner import Learner
from ldm.training.ranks import compare_processes, told_once, weights_of
from ldm.training.run import Run
from ldm.training.tracking import Tracking
from ldm.training.watch import Watch

if TYPE_CHECKING:
    from PIL.Image import Image

Tensors = Mapping[str, Mapping[str, Tensor]]
"""By file and name."""
EXIT_STOPPED_BY_SIGNAL = 75
"""A run that saved itself on SIGTERM or Ctrl-C: EX_TEMPFAIL of sysexits.h, "run the same command again"."""


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How long, how many at once, how often things are written."""

    steps: int
    batch_size: int  # images per update, over all processes and micro-batches
    accumulation: int = 1  # micro-batches per update
    workers: int = 2  # data loading processes for each training process; 0 = in the training process
    checkpoint_every: int = 1000
    keep_checkpoints: int = 2
    validate_every: int = 1000
    validate_first: bool = False  # before the first step too, to compare with when a model is trained further
    log_every: int = 10
    compare_every: int = 100  # updates between comparisons of the processes' weights; 0 = at checkpoints only

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulation", "checkpoint_every", "keep_checkpoints", "validate_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: found {getattr(self, name)}; allowed is 1 or more")
        if self.compare_every < 0:
            raise ValueError(f"compare_every: found {self.compare_every}; allowed is 0 or more; raise it")
        if self.workers < 0 or self.log_every < 1:
            raise ValueError(f"workers: found {self.workers}; allowed is 0 or more; log_every: 1 or more")
        if self.batch_size % self.accumulation:
            raise ValueError(
                f"accumulation: found {self.accumulation}; allowed is a divisor of batch_size = {self.batch_size}"
            )


FREE_TO_CHANGE = (
    "optimiser.clip",
    "optimiser.lr",
    "optimiser.text_lr_ratio",
    "data.max_bad_share",
    "loss.equivariance",
    "objective",
    "out",
    "runtime",
    "training.accumulation",
    "training.checkpoint_every",
    "training.compare_every",
    "training.keep_checkpoints",
    "training.log_every",
    "training.steps",
    "training.validate_every",
    "training.validate_first",
    "training.workers",
)
"""Config keys that may differ when a run goes on. Most change no sample and, but for rounding, no gradient; learning
rate, clipping and the number of steps are what one turns when a run is to go on otherwise."""


@dataclass(frozen=True)
class Validation:
    """Numbers and a picture, None where the stage has nothing to show."""

    numbers: dict[str, float]
    picture: Image | None = None


class Stage(Protocol):
    """What the loop needs of a stage."""

    script: str
    """The file that trains it, for messages."""

    @property
    def learners(self) -> Sequence[Learner]: ...

    def backward(self, batch: Batch, step: int, share: float) -> dict[str, Tensor]:
        """Add `share` times the gradient of this micro-batch; return detached scalars, among them `loss`."""

    def validate(self, step: int) -> Validation:
        """Measure with the averaged weights. Runs on the first process only."""


def training_batches(
    source: Source,
    data: DataConfig,
    config: TrainingConfig,
    run: Run,
    reader: LatentReader | None = None,
    wanted: Wanted = NOTHING,
    buckets: Buckets | None = None,
) -> TrainingBatches:
    """This process's batches from where the run goes on. Raises `UserError` if they cannot be shared out evenly."""
    return TrainingBatches(
        source,
        data,
        batch_size=config.batch_size,
        accumulation=config.accumulation,
        seed=run.seed,
        start_step=run.start_step,
        end_step=config.steps,
        rank=run.accelerator.process_index,
        world_size=run.accelerator.num_processes,
        workers=config.workers,
        reader=reader,
        wanted=wanted,
        buckets=buckets,
        pin_memory=run.accelerator.device.type == "cuda",
    )


def open_quarantine(source: Source, data: DataConfig, run: Run) -> Quarantine:
    """The run folder's list of unusable samples; the first process writes it."""
    path = run.folder / "quarantine.jsonl"
    return Quarantine(path, data.max_bad_share, distinct_length(source), writes=run.accelerator.is_main_process)


def train(
    stage: Stage,
    batches: Iterable[Batch],
    config: TrainingConfig,
    run: Run,
    quarantine: Quarantine,
    watch: Watch | None = None,
    alarms: Alarms | None = None,
) -> None:
    """Train from `run.start_step` to `config.steps`, resumable at every instant; `watch` keeps the best of it.

    Raises `UserError` if data, loss, gradient or weights are not finite, with a bundle to replay the step from (see
    ldm/training/failure.py), or if too much data is bad; leaves the process with exit code 75 after SIGTERM or Ctrl-C,
    once the checkpoint is written.
    """
    if run.checkpoint is not None:
        restore(stage, run.checkpoint)
    checkpoints = CheckpointFolder(run.folder / "checkpoints", config.keep_checkpoints)
    micro_batches = iter(batches)
    alarms = alarms or Alarms(run.say)
    with ExitStack() as stack:
        stopping = stack.enter_context(_stop_on_signal())
        tracking = stack.enter_context(Tracking(run.accelerator, run.folder, run.start_step))
        stack.enter_context(bundled(stage, run))
        stack.enter_context(told_once(run.accelerator))
        stack.enter_context(dead_worker_told())
        progress = stack.enter_context(_progress(config, run))
        meter = _Meter(config.batch_size)
        if config.validate_first and run.start_step == 0:
            _validate(stage, -1, run, tracking)
        for step in range(run.start_step, config.steps):
            values, samples, stop = update(stage, micro_batches, step, config, run, quarantine, stopping)
            done = step + 1
            if config.compare_every and done % config.compare_every == 0:
                compare_processes(weights_of(stage.learners), done, run.accelerator)
            progress.update()
            alarms.hear(step, values)
            if done % config.log_every == 0 or done == config.steps:
                speed = meter.images_per_second(done)
                tracking.numbers(step, values, {"images_per_second": speed})
                progress.set_postfix_str(f"loss {values['loss']:.4f}, {speed:.1f} images/s")
            validation: Mapping[str, float] = {}
            if done % config.validate_every == 0 or done == config.steps:
                validation = _validate(stage, step, run, tracking)
            if watch is not None and watch.due(done, config.steps) and watch.look(step, validation, run, tracking):
                save(stage, watch.keep, done, run, samples)
            if stop or done % config.checkpoint_every == 0 or done == config.steps:
                save(stage, checkpoints.save, done, run, samples)
            if stop:
                progress.close()
                run.say(f"stopped by a signal after step {done}; saved. The same command goes on from here.")
                raise SystemExit(EXIT_STOPPED_BY_SIGNAL)


def checkpoint_files(stage: Stage) -> dict[str, Mapping[str, Tensor]]:
    """All that a checkpoint of the stage holds, by file and name."""
    return {file: named for learner in stage.learners for file, named in learner.tensors().items()}


def save(
    stage: Stage,
    write: Callable[[int, Tensors, Mapping[str, Any]], object],
    step: int,
    run: Run,
    samples: Sequence[BatchSample] = (),
) -> None:
    """Write a checkpoint by `write`, such as `CheckpointFolder.save`, from the first process while the others wait.

    Raises `UserError`, and writes nothing, if the processes no longer hold the same weights; `NotFinite` if the last
    update, which saw `samples`, made a tensor that is not finite.
    """
    tensors = checkpoint_files(stage)
    every = {f"{file}: {name}": tensor for file, named in tensors.items() for name, tensor in named.items()}
    compare_processes(every, step, run.accelerator)
    broken = broken_files(tensors)
    if broken:
        raise NotFinite(step - 1, broken, samples)
    if run.accelerator.is_main_process:
        write(step, tensors, {"seed": run.seed, "processes": run.accelerator.num_processes})
    run.accelerator.wait_for_everyone()


def restore(stage: Stage, checkpoint: Checkpoint) -> None:
    """Load a checkpoint into the stage's learners."""
    for learner in stage.learners:
        learner.load_tensors(checkpoint.tensors)


def update(
    stage: Stage,
    micro_batches: Iterator[Batch],
    step: int,
    config: TrainingConfig,
    run: Run,
    quarantine: Quarantine,
    stopping: Sequence[int] = (),
) -> tuple[dict[str, float], list[BatchSample], bool]:
    """One optimiser update: the mean of each value over the global batch, this process's samples, and whether to stop.

    Raises `NotFinite` before anything is changed.
    """
    totals: dict[str, Tensor] = {}
    probes: dict[str, Tensor] = {}
    samples: list[BatchSample] = []
    bad: list[tuple[str, str]] = []
    share = 1 / config.accumulation
    for micro in range(config.accumulation):
        batch = next(micro_batches)
        bad.extend(batch.bad)
        samples.extend(samples_of(batch))
        batch = batch.to(run.accelerator.device, non_blocking=True)
        with synchronised(stage, run, last=micro == config.accumulation - 1):
            terms = stage.backward(batch, step, share)
        for name, value in terms.items():
            totals[name] = totals.get(name, 0) + value * share
        probes["data"] = probes.get("data", 0) + probe(floating_tensors(batch).values())
    for learner in stage.learners:
        totals[f"gradient_norm/{learner.name}"] = learner.clip_gradients()
        probes[f"weights/{learner.name}"] = learner.greatest_weight()
    probes["_stop"] = torch.tensor(float(bool(stopping)), device=run.accelerator.device)
    probes["_bad"] = torch.tensor(float(len(bad)), device=run.accelerator.device)
    values = _mean_over_processes({**totals, **probes}, run)
    looked_at = {name: values.pop(name) for name in probes}
    if looked_at["_bad"] > 0:
        # Every process counts what all have found, so that all of them stop together.
        quarantine.record(gather_object(bad) if run.accelerator.num_processes > 1 else bad)
    broken = broken_values({**looked_at, **values})
    if broken:
        raise NotFinite(step, broken, samples)
    for learner in stage.learners:
        learner.update(step)
    return values, samples, looked_at["_stop"] > 0


def _mean_over_processes(totals: dict[str, Tensor], run: Run) -> dict[str, float]:
    """Means over the processes, read back in one go: the only host sync of a step, and the finite check needs it."""
    stacked = torch.stack([value.detach().float().reshape(()) for value in totals.values()])
    reduced = run.accelerator.reduce(stacked, reduction="mean").tolist()
    return dict(zip(totals, reduced, strict=True))


def _validate(stage: Stage, step: int, run: Run, tracking: Tracking) -> Mapping[str, float]:
    """The numbers that were measured; {} on processes other than the first."""
    numbers: Mapping[str, float] = {}
    if run.accelerator.is_main_process:
        result = stage.validate(step)
        numbers = result.numbers
        tracking.numbers(step, {f"validation/{name}": value for name, value in numbers.items()})
        if result.picture is not None:
            run.save_picture(result.picture, f"samples/step-{step + 1}.png")
            tracking.picture(step, "samples", np.asarray(result.picture.convert("RGB")))
    run.accelerator.wait_for_everyone()
    return numbers


@contextmanager
def synchronised(stage: Stage, run: Run, *, last: bool) -> Iterator[None]:
    """Sum gradients over the processes at the last micro-batch only."""
    with ExitStack() as stack:
        if not last:
            for learner in stage.learners:
                stack.enter_context(run.accelerator.no_sync(learner.wrapped))
        yield


@contextmanager
def _stop_on_signal() -> Iterator[list[int]]:
    """A list that is no longer empty once SIGTERM or the first Ctrl-C has come; a second Ctrl-C stops at once."""
    received: list[int] = []

    def note(number: int, _frame: object) -> None:
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _progress(config: TrainingConfig, run: Run) -> tqdm:
    return tqdm(
        total=config.steps,
        initial=run.start_step,
        desc=run.folder.name,
        unit="step",
        disable=not run.accelerator.is_main_process,
        mininterval=1.0,
        dynamic_ncols=True,
    )


class _Meter:
    """Images per second since it was last asked."""

    def __init__(self, batch_size: int) -> None:
        self._batch_size = batch_size
        self._time: float = time.perf_counter()
        self._step: int | None = None

    def images_per_second(self, step: int) -> float:
        now = time.perf_counter()
        steps = step - self._step if self._step is not None else 1
        speed = steps * self._batch_size / max(now - self._time, 1e-9)
        self._time, self._step = now, step
        return speed

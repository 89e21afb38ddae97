"""Do the step of a failure bundle again, and say which of its samples is not finite, and where."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from itertools import islice
from typing import Any

from accelerate.utils import gather_object
from torch import Tensor, nn
from tqdm import tqdm

from ldm.data.combined import distinct_length
from ldm.data.quarantine import Quarantine
from ldm.data.sample import Batch, Source
from ldm.data.sources import DataConfig
from ldm.training.checkpoint import load_checkpoint
from ldm.training.failure import Failure
from ldm.training.finite import (
    BatchSample,
    NotFinite,
    broken_files,
    broken_tensors,
    broken_values,
    floating_tensors,
    samples_of,
)
from ldm.training.loop import Stage, TrainingConfig, checkpoint_files, restore, synchronised, update
from ldm.training.run import Run, RuntimeConfig, join_processes

NOT_THE_SAME = 1
"""The exit code of a replay that does not fail as the run did."""
_NAMES_SHOWN = 3


@dataclass(frozen=True)
class Examined:
    """One sample of the step, gone through alone."""

    sample: BatchSample
    loss: float
    data: tuple[str, ...]
    """Tensors of the sample that are not finite."""
    values: dict[str, float]
    """Loss and its terms that are not finite."""
    layer: str | None
    """The first layer that gives what is not finite of what is."""
    gradients: tuple[str, ...]
    """Weights whose gradient is not finite."""

    @property
    def finite(self) -> bool:
        """Whether all is finite."""
        return not (self.data or self.values or self.layer or self.gradients)

    def told(self) -> str:
        """One line."""
        parts = [f"position {self.sample.position}: {'finite' if self.finite else 'NOT FINITE'}, loss {self.loss:.6g}"]
        parts += [f"its {name}" for name in self.data]
        parts += [f"{name} = {value}" for name, value in self.values.items() if name != "loss"]
        parts += [f"first in {self.layer}"] if self.layer else []
        if self.gradients:
            more = f" and {len(self.gradients) - _NAMES_SHOWN} more" if len(self.gradients) > _NAMES_SHOWN else ""
            parts.append(f"gradient of {', '.join(self.gradients[:_NAMES_SHOWN])}{more}")
        return f"{'; '.join(parts)}   {self.sample.key}"


def open_replay(failure: Failure, seed: int, runtime: RuntimeConfig) -> Run:
    """The run as it was before the step: nothing in its folder is locked or written."""
    checkpoint = None if failure.checkpoint is None else load_checkpoint(failure.checkpoint)
    run = Run(failure.run_folder, seed, join_processes(failure.run_folder, runtime), checkpoint)
    run.say(f"{failure.run_folder}: going from step {run.start_step} to step {failure.step}, which is done again")
    now = (run.accelerator.num_processes, run.accelerator.mixed_precision)
    if now != (failure.processes, failure.precision):
        then = f"{failure.processes} processes and precision {failure.precision}"
        run.say(f"it ran with {then}, this replay has {now[0]} and {now[1]}: the same but for rounding")
    return run


def replay(
    stage: Stage,
    batches: Iterable[Batch],
    config: TrainingConfig,
    run: Run,
    source: Source,
    data: DataConfig,
    failure: Failure,
) -> int:
    """Train on to the step of `failure`, go through its samples one by one, do it as a whole, and print what was found.

    The exit code: 0 if the same values are not finite again. Nothing is written but the report, to stdout.
    """
    if run.checkpoint is not None:
        restore(stage, run.checkpoint)
    quarantine = Quarantine(run.folder / "quarantine.jsonl", data.max_bad_share, distinct_length(source), writes=False)
    micro_batches = iter(batches)
    steps = range(run.start_step, failure.step)
    try:
        for step in tqdm(steps, desc="replay", unit="step", disable=not run.accelerator.is_main_process):
            update(stage, micro_batches, step, config, run, quarantine)
    except NotFinite as found:
        return _report(run, failure, found, [])
    of_step = list(islice(micro_batches, config.accumulation))
    examined = [found for batch in of_step for found in _examine(stage, batch, failure.step, run)]
    try:
        update(stage, iter(of_step), failure.step, config, run, quarantine)
        after = broken_files(checkpoint_files(stage))
        return _report(run, failure, NotFinite(failure.step, after, []) if after else None, examined)
    except NotFinite as found:
        return _report(run, failure, found, examined)


def _report(run: Run, failure: Failure, found: NotFinite | None, examined: Sequence[Examined]) -> int:
    """Print it, once for all processes; returns the exit code."""
    rows = gather_object(list(examined)) if run.accelerator.num_processes > 1 else list(examined)
    same = found is not None and found.step == failure.step and found.values.keys() == failure.values.keys()
    if run.accelerator.is_main_process:
        print(f"then:     {NotFinite(failure.step, failure.values, ())}")
        now = str(found) if found is not None else f"step {failure.step}: all is finite"
        print(f"replayed: {now}   ({'the same' if same else 'NOT the same'})")
        for row in sorted(rows, key=lambda row: row.sample.position):
            print(row.told())
        if found is not None and rows and all(row.finite for row in rows):
            print("each sample alone is finite: only the whole batch is not")
    run.close()
    return 0 if same else NOT_THE_SAME


def _examine(stage: Stage, batch: Batch, step: int, run: Run) -> Iterator[Examined]:
    """Each sample of a micro-batch as a batch of its own: its draws depend on its position, not on the others."""
    for index, sample in enumerate(samples_of(batch)):
        one = _only(batch, index).to(run.accelerator.device)
        _forget_gradients(stage)
        layers: list[str] = []
        with _watching(stage, layers.append), synchronised(stage, run, last=False):
            values = {name: float(value) for name, value in stage.backward(one, step, 1.0).items()}
        gradients = {
            f"{learner.name}.{name}": parameter.grad
            for learner in stage.learners
            for name, parameter in learner.module.named_parameters()
            if parameter.grad is not None
        }
        yield Examined(
            sample,
            values["loss"],
            tuple(broken_tensors(floating_tensors(one))),
            broken_values(values),
            layers[0] if layers else None,
            tuple(broken_tensors(gradients)),
        )
    _forget_gradients(stage)


def _forget_gradients(stage: Stage) -> None:
    for learner in stage.learners:
        learner.optimiser.zero_grad(set_to_none=True)


@contextmanager
def _watching(stage: Stage, found: Callable[[str], Any]) -> Iterator[None]:
    """Inside, `found` hears the name of every innermost layer that makes what is not finite out of what is."""

    def hook(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def look(_module: nn.Module, inputs: Any, outputs: Any) -> None:
            if _finite(inputs) and not _finite(outputs):
                found(name)

        return look

    handles = [
        module.register_forward_hook(hook(f"{learner.name}.{name}"))
        for learner in stage.learners
        for name, module in learner.module.named_modules()
        if name
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _finite(values: Any) -> bool:
    """Whether the floating tensors among a layer's inputs or outputs are."""
    if isinstance(values, Tensor):
        return not values.is_floating_point() or bool(values.isfinite().all())
    if isinstance(values, dict):
        return _finite(list(values.values()))
    return all(_finite(value) for value in values) if isinstance(values, tuple | list) else True


def _only(batch: Batch, index: int) -> Batch:
    """The batch of sample `index` alone."""

    def cut(value: Any) -> Any:
        return value[index : index + 1] if isinstance(value, Tensor | tuple) else value

    parts = {part.name: cut(getattr(batch, part.name)) for part in fields(batch) if part.name not in ("moments", "bad")}
    moments = None if batch.moments is None else (cut(batch.moments[0]), cut(batch.moments[1]))
    return replace(batch, **parts, moments=moments, bad=())

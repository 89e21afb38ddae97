"""What a run will need, before it runs: memory, time and disk, and what to change if it does not fit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch

from autoencoder.model import AutoencoderConfig
from ldm.data.combined import distinct_length
from ldm.data.sample import Source
from ldm.data.sources import DataConfig, open_source
from ldm.device import choose_device, choose_dtype, process_memory, total_memory
from ldm.errors import UserError
from ldm.training.plan_count import Count, count
from ldm.training.plan_measure import Measured, measure, measured_flops
from ldm.training.plan_networks import NoData, Sketch
from ldm.training.plan_stage1 import AutoencoderMaker
from ldm.training.plan_stage2 import DiffusionMaker
from ldm.training.plan_steps import BenchMaker
from ldm.training.stage1 import Stage1Config
from ldm.training.stage2_config import Stage2Config

RunConfig: TypeAlias = Stage1Config | Stage2Config
DeviceName = Literal["auto", "cpu", "cuda"]

GIB = 2**30
CUDA_CONTEXT = 0.6 * GIB
"""What CUDA and its libraries hold of a device before the first tensor: 0.4 to 0.7 GiB, by its generation."""
USABLE = 0.93
"""The share of the memory that a run can have: the rest is lost between blocks, or scratch space of kernels."""
ASSUMED_LABELS, ASSUMED_CLASSES = 1000, 150
"""Labels and classes of maps where the data that would name them is not here: ImageNet's and ADE20K's."""


@dataclass(frozen=True)
class Machine:
    """Where the run is planned for.

    Attributes:
        kind: cpu, cuda or mps; `here` says whether this machine has it.
        devices: how many processes there will be, one a device.
        memory: bytes of each device.
        low: the type of mixed precision, None for float32.
        overhead: bytes that a process takes before its first tensor.
    """

    kind: str
    here: bool
    devices: int
    memory: int
    low: torch.dtype | None
    overhead: int

    @property
    def device(self) -> torch.device:
        """Where to measure."""
        return torch.device(self.kind)


@dataclass(frozen=True)
class Plan:
    """What is known of a run; see `Count` for the bytes of which its memory consists.

    Attributes:
        micro_batch: images that a device has at once.
        measured: None if the run was only counted.
        flops: operations a second that times are computed from; None if nothing is known of the machine's speed.
        images: of the data, None if it is not here.
        assumed: what was not here, and what was taken instead.
    """

    config: RunConfig
    machine: Machine
    micro_batch: int
    count: Count
    measured: Measured | None
    flops: float | None
    images: int | None
    assumed: tuple[str, ...] = ()

    @property
    def counted_peak(self) -> int:
        """Bytes that a device needs, by the count."""
        return peak_of(self.count, self.machine)

    @property
    def peak(self) -> int:
        """Bytes that a device needs: measured, or counted for what was not measured and is more."""
        if self.measured is None:
            return self.counted_peak
        peaks = [self.measured.peak, *(phase.peak for phase in self.count.phases.values())]
        return self.machine.overhead + max(peaks) + buckets_of(self.count, self.machine)

    @property
    def fits(self) -> bool:
        """Whether the machine has so much."""
        return self.peak <= USABLE * self.machine.memory

    @property
    def step_seconds(self) -> float | None:
        """Of an update with all its micro-batches."""
        accumulation = self.config.training.accumulation
        if self.measured is not None:
            return accumulation * self.measured.micro_batch + self.measured.update
        return None if self.flops is None else accumulation * self.count.flops / self.flops

    @property
    def images_per_second(self) -> float | None:
        """Over all devices."""
        return None if self.step_seconds is None else self.config.training.batch_size / self.step_seconds

    def seconds(self) -> dict[str, float]:
        """Of every part of the whole run by name; empty if the speed is not known."""
        if self.step_seconds is None or self.flops is None:
            return {}
        parts = {"steps": self.config.training.steps * self.step_seconds}
        for name, phase in self.count.phases.items():
            # What comes before training is shared out; the first process alone draws previews.
            shared = self.machine.devices if phase.before else 1
            parts[name] = phase.calls * phase.flops / self.flops / shared
        return parts


def machine_for(
    runtime_precision: str, device: DeviceName = "auto", devices: int | None = None, memory: float | None = None
) -> Machine:
    """This machine, or another one: `memory` in GiB, and `device` cuda, make it one. Raises `UserError`."""
    chosen = choose_device("auto")
    kind = chosen.type if device == "auto" else device
    here = kind == "cpu" or kind == chosen.type
    if memory is None and not here:
        raise UserError(f"--memory: found none, and this machine has no {kind}; allowed is its GiB, such as 80")
    if runtime_precision == "auto" and not here:
        dtype = torch.bfloat16  # as on every NVIDIA GPU since 2020
    else:
        dtype = choose_dtype(runtime_precision, torch.device(kind if here else "cpu"))
    count = torch.cuda.device_count() if kind == "cuda" and here else 1
    return Machine(
        kind=kind,
        here=here,
        devices=devices or count,
        memory=int(memory * GIB) if memory is not None else total_memory(torch.device(kind)),
        low=None if dtype == torch.float32 else dtype,
        overhead=int(CUDA_CONTEXT) if kind == "cuda" else process_memory(),
    )


def make_plan(
    config: RunConfig,
    machine: Machine,
    *,
    autoencoder: AutoencoderConfig | None = None,
    flops: float | None = None,
    dry: bool = True,
    say: Callable[[str], None] = lambda line: None,
) -> Plan:
    """Count the run, and unless `dry` measure a few of its steps if they fit. Raises `UserError`.

    `autoencoder` is the architecture of the one that a stage 2 config names, if it is still to be made; `flops` the
    operations a second that the machine is said to reach.
    """
    source, assumed = _source(config)
    sketch = Sketch(autoencoder, assumed)
    maker = _maker(config, source, machine, sketch)
    images = distinct_length(source) or None
    counted = count(maker, machine.low, config.training.accumulation, images or 0)
    if machine.here and flops is None:
        flops = measured_flops(machine.device, machine.low)
    notes = tuple(dict.fromkeys(assumed))
    plan = Plan(config, machine, micro_batch_of(config, machine), counted, None, flops, images, notes)
    if dry:
        return plan
    if not machine.here or machine.overhead + counted.step > total_memory(machine.device):
        say("not measured, since it does not fit here: what follows is counted")
        return plan
    about = f", {3 * counted.flops / flops:.0f} s at least" if flops else ""
    say(f"measuring 3 micro-batches of {plan.micro_batch} images{about}")
    measured = measure(maker, machine.device, machine.low)
    return replace(plan, measured=measured, flops=counted.flops / measured.micro_batch)


def recount(config: RunConfig, machine: Machine, autoencoder: AutoencoderConfig | None) -> Count:
    """The count of a config that differs."""
    source, _ = _source(config)
    maker = _maker(config, source, machine, Sketch(autoencoder))
    return count(maker, machine.low, config.training.accumulation, 0)


def peak_of(counted: Count, machine: Machine) -> int:
    """Bytes that a device needs."""
    return machine.overhead + counted.worst[1] + buckets_of(counted, machine)


def buckets_of(counted: Count, machine: Machine) -> int:
    """Bytes of the buckets in which several processes exchange gradients."""
    return counted.gradients if machine.devices > 1 else 0


def micro_batch_of(config: RunConfig, machine: Machine) -> int:
    """Images that a device has at once. Raises `UserError` if they cannot be shared out evenly."""
    batch, accumulation = config.training.batch_size, config.training.accumulation
    parts = machine.devices * accumulation
    if batch % parts:
        raise UserError(
            f"training.batch_size: found {batch} for {machine.devices} devices x accumulation {accumulation}; "
            f"allowed is a multiple of {parts}; set {max(1, round(batch / parts)) * parts}"
        )
    return batch // parts


def _maker(config: RunConfig, source: Source, machine: Machine, sketch: Sketch) -> BenchMaker[Any]:
    size = micro_batch_of(config, machine)
    if isinstance(config, Stage1Config):
        return AutoencoderMaker(config, sketch, size)
    return DiffusionMaker(config, source, sketch, size)


def _source(config: RunConfig) -> tuple[Source, list[str]]:
    """The data, for its number of images and its classes, and what had to be assumed of it."""
    if _is_here(config.data):
        return open_source(config.data), []
    if isinstance(config, Stage1Config):  # nothing of it depends on the number of images
        return NoData([], []), []
    assumed = [f"data {', '.join(_roots(config.data))} is not here, so how many images there are is not known"]
    label, semantic, labels, classes = config.conditions.label, config.conditions.semantic, 0, 0
    if label is not None and label.classes is None:
        labels = ASSUMED_LABELS
        assumed.append(f"labels: taken to be {labels}")
    if semantic is not None and semantic.classes is None:
        classes = ASSUMED_CLASSES
        assumed.append(f"classes of maps: taken to be {classes}")
    return NoData([f"label {i}" for i in range(labels)], [f"class {i}" for i in range(classes)]), assumed


def _is_here(data: DataConfig) -> bool:
    # A pattern of shards is no path, but the folder that they lie in is one.
    paths = (Path(root).parent if data.source == "shards" else Path(root) for root in _roots(data))
    return data.source == "scenes" or all(path.exists() for path in paths)


def _roots(data: DataConfig) -> list[str]:
    return [folder.root for folder in data.folders] if data.folders is not None else [str(data.root)]

"""A couple of real steps on made-up batches: their time and memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import nn

from ldm.device import peak_memory, process_memory, start_peak
from ldm.training.learner import OptimiserConfig, build_optimiser
from ldm.training.plan_steps import Bench, BenchMaker, Networks

MICRO_BATCHES = 2
"""Timed ones; one more and an update come first, in which kernels are chosen and the optimiser makes its state."""


@dataclass(frozen=True)
class Measured:
    """Of one process: seconds of a micro-batch and of an update; bytes at most, less those that it had before."""

    micro_batch: float
    update: float
    peak: int


class Here:
    """The `Place` that is a device of this machine."""

    def __init__(self, device: torch.device, low: torch.dtype | None) -> None:
        self.device, self._low = device, low

    def autocast(self) -> AbstractContextManager[object]:
        """Mixed precision."""
        return torch.autocast(self.device.type, self._low or torch.bfloat16, enabled=self._low is not None)

    def optimiser(self, config: OptimiserConfig, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
        """The real one."""
        return build_optimiser(config, parameters, self.device)


def measure(maker: BenchMaker[Networks], device: torch.device, low: torch.dtype | None) -> Measured:
    """Run a few micro-batches and two updates of the run that `maker` makes. Raises torch.OutOfMemoryError."""
    before = process_memory() if device.type == "cpu" else 0
    with torch.device(device):
        bench = maker.bench(maker.networks(), Here(device, low))
        bench.micro_batch()
        _update(bench)
        start_peak(device)
        micro_batch = _seconds(bench.micro_batch, device, MICRO_BATCHES)
        update = _seconds(lambda: _update(bench), device, 1)
        return Measured(micro_batch, update, peak_memory(device) - before)


def measured_flops(device: torch.device, low: torch.dtype | None) -> float:
    """Floating-point operations a second of the convolution that a U-Net has most of, forward and backward."""
    images, side, channels = (64 if device.type == "cuda" else 2), 32, 320
    layer = nn.Conv2d(channels, channels, 3, padding=1, device=device).to(memory_format=torch.channels_last)
    inputs = torch.randn(images, channels, side, side, device=device).to(memory_format=torch.channels_last)
    inputs.requires_grad_(True)
    place = Here(device, low)

    def run() -> None:
        with place.autocast():
            outputs = layer(inputs)
        outputs.float().sum().backward()

    run()
    forward = 2 * images * side**2 * channels**2 * 9
    return 3 * forward / _seconds(run, device, 3)  # the backward pass is one convolution for inputs, one for weights


def _update(bench: Bench) -> None:
    for update in bench.updates:
        update()


def _seconds(function: Callable[[], object], device: torch.device, times: int) -> float:
    """Mean of so many calls."""
    _wait(device)
    start = time.perf_counter()
    for _ in range(times):
        function()
    _wait(device)
    return (time.perf_counter() - start) / times


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

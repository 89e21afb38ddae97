"""A run counted without doing it: parameters, bytes and operations of its step and of all else that it does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ldm.training.learner import OptimiserConfig
from ldm.training.plan_ledger import Ledger, WithoutData
from ldm.training.plan_steps import STEP, Bench, BenchMaker, Networks

SMALLEST_IN_8_BITS, BLOCK = 4096, 256
"""AdamW8bit keeps smaller weights in 32 bits, and one scale for each block of the others (bitsandbytes' defaults)."""


@dataclass(frozen=True)
class PhaseCount:
    """Something that a run does beside its steps.

    Attributes:
        peak: bytes at most, weights included.
        flops: floating-point operations of once.
        calls: how often in the whole run.
        key, at_once, before: as in `Phase`.
    """

    peak: int
    flops: int
    calls: float
    key: str | None
    at_once: int
    before: bool


@dataclass(frozen=True)
class Count:
    """What one process needs.

    Attributes:
        parameters: of every network by name: all, trained.
        weights, gradients, optimiser, average: bytes that they take.
        activations: bytes that the forward pass leaves for the backward pass.
        step: bytes at most in an update, all of these included.
        flops: floating-point operations of a micro-batch, forward and backward.
        phases: what else it does.
        cached_image: bytes of an image in the latent cache, 0 without one.
    """

    parameters: Mapping[str, tuple[int, int]]
    weights: int
    gradients: int
    optimiser: int
    average: int
    activations: int
    step: int
    flops: int
    phases: Mapping[str, PhaseCount]
    cached_image: int

    @property
    def checkpoint(self) -> int:
        """Bytes of a checkpoint: trained weights, the state of their optimiser, their average."""
        return self.gradients + self.optimiser + self.average

    @property
    def worst(self) -> tuple[str, int]:
        """What takes most memory, and its bytes."""
        peaks = {STEP: self.step} | {name: phase.peak for name, phase in self.phases.items()}
        return max(peaks.items(), key=lambda item: item[1])


class Nowhere:
    """The `Place` where a run is only counted: the meta device."""

    device = WithoutData.device

    def __init__(self, low: torch.dtype | None) -> None:
        self._without_data = WithoutData(low)

    def entered(self) -> AbstractContextManager[Ledger]:
        """Inside, all is counted."""
        return self._without_data.entered()

    def autocast(self) -> AbstractContextManager[object]:
        """Mixed precision."""
        return self._without_data.autocast()

    def optimiser(self, config: OptimiserConfig, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
        """What takes the memory of the one that `config` names: kernels that update in place need data."""
        return _States(parameters, eight_bits=config.kind == "adamw8bit")


class _States(torch.optim.Optimizer):
    """The states of torch's fused AdamW, or of bitsandbytes' AdamW8bit."""

    def __init__(self, parameters: Sequence[nn.Parameter], *, eight_bits: bool) -> None:
        super().__init__(parameters, {})
        self._eight_bits = eight_bits

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for parameter in self.param_groups[0]["params"]:
            state = self.state[parameter]
            if state:
                continue
            low = self._eight_bits and parameter.numel() >= SMALLEST_IN_8_BITS
            state["moments"] = [torch.zeros_like(parameter, dtype=torch.uint8 if low else None) for _ in range(2)]
            if low:
                blocks = -(-parameter.numel() // BLOCK)
                state["scales"] = [torch.zeros(blocks, device=parameter.device) for _ in range(2)]


def count(maker: BenchMaker[Networks], low: torch.dtype | None, accumulation: int, images: int) -> Count:
    """Count the run that `maker` makes, with mixed precision in `low` and data of `images` images."""
    place = Nowhere(low)
    with torch.device(place.device):
        networks = maker.networks()
    with place.entered() as ledger:
        bench = maker.bench(networks, place)
        tensors = [t for part in bench.parts.values() for t in (*part.parameters(), *part.buffers())]
        for tensor in tensors:
            ledger.add(tensor)
        average = sum(_size(t) for update in bench.updates if update.ema for t in update.ema.shadow_params)
        trained = [parameter for update in bench.updates for parameter in update.parameters]
        before = ledger.now
        _make_gradients(bench)
        for update in bench.updates:
            update.optimiser.step()  # makes its state
            update.optimiser.zero_grad(set_to_none=True)
        optimiser = ledger.now - before
        ledger.start()
        if accumulation > 1:  # from the second micro-batch on gradients are there before it
            _make_gradients(bench)
        before = ledger.now
        bench.micro_batch()
        activations, flops = ledger.forward_peak - before, ledger.flops
        for update in bench.updates:  # clipping and the optimiser work in place
            update.optimiser.zero_grad(set_to_none=True)
            if update.ema is not None:
                update.ema.step(update.parameters)
        step = ledger.peak
        phases = {}
        for name, phase in bench.phases().items():
            ledger.start()
            phase.run()
            peak = ledger.peak - (optimiser if phase.before else 0)
            calls = phase.times(images)
            phases[name] = PhaseCount(peak, ledger.flops, calls, phase.key, phase.at_once, phase.before)
    return Count(
        parameters={name: _numbers(part) for name, part in bench.parts.items()},
        weights=sum(map(_size, {id(t): t for t in tensors}.values())),
        gradients=sum(map(_size, trained)),
        optimiser=optimiser,
        average=average,
        activations=activations,
        step=step,
        flops=flops,
        phases=phases,
        cached_image=bench.cached_image,
    )


def _make_gradients(bench: Bench) -> None:
    for update in bench.updates:
        for parameter in update.parameters:
            parameter.grad = torch.zeros_like(parameter)


def _numbers(part: nn.Module) -> tuple[int, int]:
    parameters = list(part.parameters())
    return sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad)


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()

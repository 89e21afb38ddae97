"""What a run does, on made-up batches: common to both stages.

The same code is counted without data (`plan_count.py`) and timed on a device (`plan_measure.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from diffusers.training_utils import EMAModel
from torch import nn

from ldm.training.learner import OptimiserConfig

Networks = TypeVar("Networks")
STEP = "step"
"""The name of an update among all that takes memory."""


class Place(Protocol):
    """Where it happens: a device, or nowhere (`WithoutData`)."""

    device: torch.device

    def autocast(self) -> AbstractContextManager[object]:
        """Mixed precision, if the run has it."""

    def optimiser(self, config: OptimiserConfig, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
        """As `build_optimiser`."""


@dataclass(frozen=True)
class Phase:
    """Something that a run does beside its steps.

    Attributes:
        run: does it once.
        times: how often that is in the whole run, the data having so many images.
        key, at_once: the config key that says how many images it takes at once, and how many; None if none does.
        before: whether it comes before the first update, when the optimiser holds nothing yet.
    """

    run: Callable[[], object]
    times: Callable[[int], float]
    key: str | None
    at_once: int
    before: bool = False


class Update:
    """The trained weights of a module with optimiser and moving average: what a `Learner` holds, for one process."""

    def __init__(self, module: nn.Module, config: OptimiserConfig, ema_decay: float, place: Place) -> None:
        self.parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self.config = config
        self.optimiser = place.optimiser(config, self.parameters)
        self.ema = EMAModel(self.parameters, decay=ema_decay, foreach=True) if ema_decay > 0 else None

    def __call__(self) -> None:
        """As at the end of a step of the loop."""
        torch.nn.utils.clip_grad_norm_(self.parameters, self.config.clip or torch.inf)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        if self.ema is not None:
            self.ema.step(self.parameters)


class Bench(Protocol):
    """A run of one of the two stages.

    Attributes:
        parts: the networks by name, trained or not.
        updates: one for each optimiser.
        cached_image: bytes of an image in the latent cache, 0 without one.
    """

    parts: Mapping[str, nn.Module]
    updates: Sequence[Update]
    cached_image: int

    def micro_batch(self) -> None:
        """Forward and backward pass of one micro-batch."""

    def phases(self) -> dict[str, Phase]:
        """All else that the run does."""


class BenchMaker(Protocol[Networks]):
    """Makes the bench of a config, in two steps: networks are built fastest where they need no values."""

    def networks(self) -> Networks:
        """On torch's default device. Raises `UserError`."""

    def bench(self, networks: Networks, place: Place) -> Bench:
        """Once; what is made of the networks takes their place."""

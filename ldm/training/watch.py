"""Looking at a model while it trains: measured every N steps, tracked like the loss, the best checkpoint kept.

Nothing here changes what is trained: measurements draw from generators of their own, with the averaged weights.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from torch import Tensor

from ldm.errors import UserError, user_input
from ldm.evaluation.extractors import ExtractorConfig
from ldm.training.checkpoint import Checkpoint, CheckpointFolder, load_checkpoint
from ldm.training.run import Run
from ldm.training.tracking import Tracking

SCENE_METRICS = ("background", "objects", "colours", "sizes", "relation", "everything")
"""Shares of pictures in which the exact scorer finds that part of the prompt right; built-in scenes only."""
IMAGE_METRICS = ("fid", "sfid", "kid", "inception_score", "precision", "recall", "density", "coverage")
LOWER_IS_BETTER = ("fid", "sfid", "kid", "lpips")
BEST = "best"


@dataclass(frozen=True, kw_only=True)
class WatchConfig:
    """Draw pictures every N steps of stage 2 and measure them."""

    every: int = 1000
    count: int = 64  # pictures; FID depends on it, so figures of different counts are not comparable
    reference: int = 1024  # images of validation_data (or data) that they are compared with, at most
    metric: str = "fid"  # what the best checkpoint is chosen by
    keep_best: bool = True  # in checkpoints/best, and at the end as RUN/best
    num_inference_steps: int = 25
    guidance_scale: float = 4.0
    batch_size: int = 64  # pictures drawn at once
    extractor: ExtractorConfig = field(default_factory=ExtractorConfig)  # what FID and its like are seen through

    def __post_init__(self) -> None:
        for name, least in (
            ("every", 1),
            ("count", 8),
            ("reference", 8),
            ("num_inference_steps", 1),
            ("batch_size", 1),
        ):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: found {getattr(self, name)}; allowed is {least} or more; raise it")
        allowed = (*IMAGE_METRICS, *SCENE_METRICS)
        if self.metric not in allowed:
            raise ValueError(f"metric: found {self.metric!r}; allowed is {', '.join(allowed)}; choose one")
        if self.metric in ("sfid", "inception_score") and self.extractor.kind != "inception":
            raise ValueError(
                f"metric: found {self.metric}, which only inception has; set extractor.kind: inception and its weights"
            )


def watched(checkpoint: Checkpoint) -> str:
    """`fid 12.3 at step 4000`, of a checkpoint that `Watch` kept."""
    told = checkpoint.state["watch"]
    return f"{told['metric']} {told['value']:.4g} at step {checkpoint.step}"


class Watch:
    """When to look, what was best so far, and the checkpoint of it.

    `measure` gives the numbers, on the first process; without it those of validation are taken.
    """

    def __init__(
        self,
        run_folder: Path,
        *,
        every: int,
        metric: str,
        keep_best: bool = True,
        measure: Callable[[], Mapping[str, float]] | None = None,
    ) -> None:
        self.metric, self._every, self._keep_best, self._measure = metric, every, keep_best, measure
        # Read anew after a restart: the best of a run that is gone on with is the best of all its parts.
        self._checkpoints = CheckpointFolder(run_folder / "checkpoints" / BEST, keep=1_000_000)
        self._numbers: dict[str, float] = {}

    def due(self, done: int, steps: int) -> bool:
        """Whether to look after `done` updates out of `steps`."""
        return done % self._every == 0 or done == steps

    def look(self, step: int, validation: Mapping[str, float], run: Run, tracking: Tracking) -> bool:
        """Measure, track, and say, on every process alike, whether this is the best model so far and is to be kept."""
        better = False
        if run.accelerator.is_main_process:
            self._numbers = dict(validation if self._measure is None else self._measure())
            if self._measure is not None:
                told = {f"watch/{name}": value for name, value in self._numbers.items() if not math.isnan(value)}
                tracking.numbers(step, told)
            if self.metric not in self._numbers:
                raise UserError(
                    f"metric: found {self.metric}, which is not measured here; allowed is {', '.join(self._numbers)}; "
                    "choose one of these"
                )
            better = self._keep_best and self._is_better(self._numbers[self.metric])
        return any(gather_object([better])) if run.accelerator.num_processes > 1 else better

    def keep(self, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> None:
        """Write the checkpoint of the best model in place of the one before; whichever is there is whole."""
        told = {"metric": self.metric, "value": self._numbers[self.metric], "numbers": self._numbers}
        self._checkpoints.save(step, tensors, {**state, "watch": told})
        for other in self._checkpoints.steps():
            if other != step:
                self._checkpoints.remove(other)

    def best(self) -> Checkpoint | None:
        """The checkpoint that was best by this metric; None if none was kept. Raises `UserError` if it is damaged."""
        values = self._values()
        folder = min(values, key=lambda one: self._rank(values[one]), default=None)
        return None if folder is None else load_checkpoint(folder)

    def _values(self) -> dict[Path, float]:
        """What the kept checkpoints had of this metric: one, unless a process died between writing and removing."""
        found: dict[Path, float] = {}
        for step in self._checkpoints.steps():
            folder = self._checkpoints.folder / f"step-{step}"
            with user_input(f"checkpoint {folder}", OSError, ValueError, KeyError, TypeError):
                told = json.loads((folder / "state.json").read_text(encoding="utf-8"))["watch"]
                if told["metric"] == self.metric:
                    found[folder] = float(told["value"])
        return found

    def _is_better(self, value: float) -> bool:
        if math.isnan(value):
            return False
        return all(self._rank(value) < self._rank(before) for before in self._values().values())

    def _rank(self, value: float) -> float:
        return value if self.metric in LOWER_IS_BETTER else -value

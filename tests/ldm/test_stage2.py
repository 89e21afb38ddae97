"""The loss of stage 2: weights of samples, in one batch and spread over micro-batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState

from conditioning.encoders import ConditionEncoders
from conditioning.text import TextConfig
from ldm.data.sample import Batch
from ldm.data.sources import DataConfig
from ldm.noise import NoiseConfig
from ldm.pipeline import LatentDiffusionPipeline
from ldm.training.conditions import ConditionsConfig
from ldm.training.loop import TrainingConfig
from ldm.training.run import RuntimeConfig, open_run
from ldm.training.stage2 import DiffusionStage
from ldm.training.stage2_config import Stage2Config

WEIGHTS = torch.tensor([1.0, 0.25, 3.0, 1.0])


@pytest.fixture(autouse=True)
def _one_machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture
def stage(make_pipeline: Callable[..., LatentDiffusionPipeline], tmp_path: Path) -> DiffusionStage:
    config = Stage2Config(
        out=str(tmp_path),
        data=DataConfig(root="unused", resolution=32),
        training=TrainingConfig(steps=1, batch_size=4),
        autoencoder="unused",
        conditions=ConditionsConfig(text=TextConfig(dropout=0.5)),
        runtime=RuntimeConfig(precision="fp32", trackers=()),
        ema_decay=0,
    )
    pipeline = make_pipeline(NoiseConfig())
    encoders = ConditionEncoders(pipeline.text_encoder)
    run = open_run(tmp_path, 0, config.runtime, 1)
    return DiffusionStage(config, run, pipeline.vae, encoders, pipeline.unet, NoiseConfig(), None)  # type: ignore[arg-type]


def batch() -> Batch:
    images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    return Batch(("a", "b", "c", "d"), (0, 1, 2, 3), ("a dog", "a cat", "red", "blue"), images, weights=WEIGHTS)


def part(whole: Batch, places: slice) -> Batch:
    return Batch(
        whole.keys[places],
        whole.positions[places],
        whole.captions[places],
        whole.images[places],  # type: ignore[index]
        weights=WEIGHTS[places],
    )


def gradients(stage: DiffusionStage, batches: list[Batch]) -> tuple[float, torch.Tensor]:
    """The step's loss and gradient, as the loop gathers them from micro-batches."""
    share = 1 / len(batches)
    loss = sum(stage.backward(one, 5, share)["loss"].item() * share for one in batches)
    parts = [p.grad.flatten() for p in stage.learner.module.parameters() if p.grad is not None]
    stage.learner.optimiser.zero_grad()
    return loss, torch.cat(parts)


def test_the_loss_is_the_mean_of_each_samples_times_its_weight(stage: DiffusionStage) -> None:
    each = [gradients(stage, [replace(part(batch(), slice(i, i + 1)), weights=None)]) for i in range(4)]
    loss, gradient = gradients(stage, [batch()])
    assert loss == pytest.approx(sum(w * one for w, (one, _) in zip(WEIGHTS.tolist(), each, strict=True)) / 4, rel=1e-5)
    wanted = sum(w * one for w, (_, one) in zip(WEIGHTS, each, strict=True)) / 4
    assert (gradient - wanted).abs().max() <= 1e-5 * gradient.abs().max()  # type: ignore[operator]


def test_micro_batches_give_the_same_gradient(stage: DiffusionStage) -> None:
    loss, gradient = gradients(stage, [batch()])
    in_two, again = gradients(stage, [part(batch(), slice(0, 2)), part(batch(), slice(2, 4))])
    assert in_two == pytest.approx(loss, rel=1e-5)
    assert (again - gradient).abs().max() <= 1e-5 * gradient.abs().max()

"""Alarms are raised once for what is wrong, and never for noise."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import numpy as np
import pytest

from ldm.training.alarms import AdversaryWatch, Alarms, LossSpike

STEPS = 3000


def heard(losses: Iterable[float]) -> list[tuple[int, str]]:
    spike = LossSpike()
    told = [(step, spike.hear(float(loss))) for step, loss in enumerate(losses)]
    return [(step, line) for step, line in told if line is not None]


def falling(seed: int, noise: str = "gamma", size: float = 0.5) -> np.ndarray:
    """Like a diffusion loss of small batches: it falls to a third while single values vary by half or more."""
    random, steps = np.random.default_rng(seed), np.arange(STEPS)
    curve = 0.3 + 0.7 * np.exp(-steps / 400)
    if noise == "gamma":
        return curve * random.gamma(1 / size**2, size**2, STEPS)
    return curve * np.exp(size * random.standard_t(3, STEPS).clip(-6, 6))  # single values a hundred times as large


@pytest.mark.parametrize("noise", ["gamma", "heavy tails"])
def test_no_false_alarm_on_noisy_falling_curves(noise: str) -> None:
    for seed in range(6):
        assert heard(falling(seed, noise)) == []


def test_no_false_alarm_on_single_spikes_on_a_flat_loss_and_on_waves() -> None:
    spiked = falling(0)
    spiked[::50] *= 1000
    assert heard(spiked) == []
    assert heard(np.full(STEPS, 0.5)) == []
    assert heard(np.zeros(STEPS)) == []
    assert heard(0.5 + 0.05 * np.sin(np.arange(STEPS) / 100)) == []
    assert heard(-1.0 + 0.01 * np.random.default_rng(0).normal(size=STEPS)) == []  # a learned log-variance


@pytest.mark.parametrize(
    "rise",
    [lambda t: 10.0, lambda t: 4.0, lambda t: 1 + t / 20, lambda t: math.exp(min(t, 400) / 30)],
    ids=["tenfold", "fourfold", "linear", "exponential"],
)
def test_a_loss_that_stays_high_is_told_once_and_soon(rise: Callable[[int], float]) -> None:
    for seed in range(6):
        losses = falling(seed)
        losses[1500:] *= [rise(t) for t in range(STEPS - 1500)]
        ((step, line),) = heard(losses)
        assert 1500 < step < 1750
        assert "lower optimiser.lr" in line and "\n" not in line


def test_a_negative_loss_that_rises() -> None:
    losses = -1.0 + 0.01 * np.random.default_rng(0).normal(size=STEPS)
    losses[2000:] += 0.5
    assert len(heard(losses)) == 1


def adversary(
    loss: float, real: float, fake: float, weight: float = 0.4, kind: str = "hinge", steps: int = 1500, noise: float = 0
) -> list[str]:
    watch = AdversaryWatch(loss=kind, weight=0.5)
    random = np.random.default_rng(0)
    lines = []
    for _ in range(steps):
        values = {"discriminator": loss + noise * abs(random.normal()), "logits_real": real, "logits_fake": fake}
        lines += watch.hear({"loss": 1.0, **values, "adversarial_weight": weight})
    return lines


@pytest.mark.parametrize(("kind", "blind"), [("hinge", 1.0), ("vanilla", math.log(2))])
def test_a_discriminator_of_no_use_is_told_once_each(kind: str, blind: float) -> None:
    assert [line.split("(")[0] for line in adversary(0.0, 3.0, -3.0, kind=kind, noise=0.001)] == [
        "for 500 steps the discriminator has told reconstructions from images without a mistake "
    ]
    (line,) = adversary(blind, 0.003, -0.001, kind=kind)
    assert "has not told reconstructions from images at all" in line and "raise discriminator_optimiser.lr" in line
    (line,) = adversary(0.9 * blind, 0.2, -0.1, weight=5000.0, kind=kind)
    assert "adversarial weight has been at its ceiling" in line


def test_one_that_learns_or_has_not_begun_is_left_alone() -> None:
    assert adversary(0.85, 0.3, -0.2, noise=0.1) == []
    assert adversary(0.02, 2.0, -2.0) == []
    assert adversary(1.0, 0.6, 0.1) == []  # wrong in level, but it tells them apart
    assert adversary(0.0, 3.0, -3.0, steps=499) == []
    watch = AdversaryWatch(loss="hinge", weight=0.0)
    assert [line for _ in range(1000) for line in watch.hear({"loss": 1.0, "reconstruction": 1.0})] == []


def test_an_alarm_is_one_line_with_its_step_and_stage_1_is_judged_by_its_reconstruction() -> None:
    lines: list[str] = []
    alarms = Alarms(lines.append, AdversaryWatch(loss="hinge", weight=0.5))
    for step in range(2000):
        adversarial = {"discriminator": 0.0, "logits_real": 2.0, "logits_fake": -2.0} if step >= 1000 else {}
        alarms.hear(step, {"loss": 100.0 if step >= 1000 else 1.0, "reconstruction": 0.2, **adversarial})
    (line,) = lines
    assert line.startswith("warning: step 1499: for 500 steps the discriminator")

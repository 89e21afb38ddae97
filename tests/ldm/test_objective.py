"""Timestep distributions, min-SNR weights as identities, the loss by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ldm.noise import NoiseConfig, NoiseSchedule, PredictionType, to_x0, training_target
from ldm.objective import ObjectiveConfig, diffusion_loss, loss_weights, timesteps_from_uniforms

FLOW = NoiseConfig(schedule="flow", prediction="flow")
NO_FLOOR = ObjectiveConfig(min_snr_floor=0.0)


def noise_for(prediction: str) -> NoiseConfig:
    return FLOW if prediction == "flow" else NoiseConfig(prediction=prediction)


def timesteps_for(prediction: str) -> torch.Tensor:
    return torch.tensor([20.0, 200.0, 500.0, 800.0, 950.0] if prediction == "flow" else [20, 200, 500, 800, 950])


@given(snr=st.floats(1e-4, 1e4), gamma=st.floats(0.5, 20))
def test_min_snr_weights_are_the_papers(snr: float, gamma: float) -> None:
    config = ObjectiveConfig(min_snr_gamma=gamma, min_snr_floor=0.0)
    expected = {
        "sample": min(snr, gamma),
        "epsilon": min(snr, gamma) / snr,
        "v_prediction": min(snr, gamma) / (snr + 1),
        "flow": min(snr, gamma) / (1 + math.sqrt(snr)) ** 2,
    }
    for prediction, weight in expected.items():
        found = loss_weights(config, noise_for(prediction), torch.tensor([snr], dtype=torch.float64))
        assert found.item() == pytest.approx(weight, rel=1e-5)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample", "flow"])
def test_whatever_is_predicted_the_weighted_loss_is_that_of_x0(prediction: PredictionType) -> None:
    """weight * |output - target|^2 = min(snr, gamma) * |x_0 told by the output - x_0|^2, for any wrong output."""
    noise_config, timesteps = noise_for(prediction), timesteps_for(prediction)
    levels = NoiseSchedule.from_config(noise_config).levels(timesteps)
    x_0, noise, wrong = torch.randn(3, 5, 2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x_t = levels.alpha * x_0 + levels.sigma * noise
    target = training_target(prediction, x_0, noise, levels)
    loss = diffusion_loss(wrong, target, loss_weights(NO_FLOOR, noise_config, levels.snr))
    told = to_x0(prediction, wrong, x_t, levels)
    expected = levels.snr.clamp(max=5) * (told - x_0).square().flatten(1).mean(1).float()
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("prediction", ["v_prediction", "sample"])
def test_the_last_step_of_zero_terminal_snr_is_trained(prediction: str) -> None:
    noise = NoiseConfig(prediction=prediction, zero_terminal_snr=True)
    snr = NoiseSchedule.from_config(noise).snr(torch.tensor([999]))
    assert snr.item() == 0
    assert loss_weights(ObjectiveConfig(), noise, snr).item() == pytest.approx(0.05)
    assert loss_weights(NO_FLOOR, noise, snr).item() == 0


def test_the_floor_acts_on_the_noisy_end_only() -> None:
    snr = torch.tensor([1e4, 10.0, 1.0, 0.06])
    for prediction in ("v_prediction", "sample", "flow"):
        noise = noise_for(prediction)
        assert torch.equal(loss_weights(ObjectiveConfig(), noise, snr), loss_weights(NO_FLOOR, noise, snr))


def test_epsilon_weighs_one_up_to_gamma_and_pure_noise_too() -> None:
    weights = loss_weights(ObjectiveConfig(), NoiseConfig(prediction="epsilon"), torch.tensor([0.0, 1.0, 5.0, 50.0]))
    torch.testing.assert_close(weights, torch.tensor([1.0, 1.0, 1.0, 0.1]))


def test_without_weighting_every_weight_is_one() -> None:
    weights = loss_weights(ObjectiveConfig(weighting="none"), NoiseConfig(), torch.tensor([0.0, 1e3]))
    assert weights.tolist() == [1, 1] and weights.dtype == torch.float32


def test_uniform_timesteps_take_each_value_equally_often() -> None:
    uniforms = (torch.arange(8000) + 0.5) / 8000
    timesteps = timesteps_from_uniforms(ObjectiveConfig(), NoiseConfig(timesteps=1000), uniforms)
    assert timesteps.dtype == torch.int64
    assert torch.equal(timesteps.bincount(), torch.full((1000,), 8))


@given(
    uniform=st.floats(0, 1, exclude_max=True, width=32),
    sampling=st.sampled_from(["uniform", "logit_normal"]),
    shift=st.floats(0.2, 5),
    steps=st.integers(2, 100_000),
)
def test_timesteps_stay_in_range(uniform: float, sampling: str, shift: float, steps: int) -> None:
    config = ObjectiveConfig(timestep_sampling=sampling)
    uniforms = torch.tensor([uniform])
    whole = timesteps_from_uniforms(config, NoiseConfig(timesteps=steps), uniforms)
    assert 0 <= whole.item() < steps
    flow = NoiseConfig(schedule="flow", prediction="flow", timesteps=steps, flow_shift=shift)
    real = timesteps_from_uniforms(config, flow, uniforms)
    assert 0 < real.item() <= steps and real.dtype == torch.float32
    assert torch.isfinite(NoiseSchedule.from_config(flow).snr(real)).all()


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (-0.5, 0.6)])
def test_logit_normal_has_its_distribution(mean: float, std: float) -> None:
    """The share of timesteps below sigma is Phi((logit(sigma) - mean) / std)."""
    config = ObjectiveConfig(timestep_sampling="logit_normal", logit_mean=mean, logit_std=std)
    uniforms = (torch.arange(20_000) + 0.5) / 20_000
    sigma = timesteps_from_uniforms(config, FLOW, uniforms) / 1000
    for level in (0.1, 0.3, 0.5, 0.8):
        expected = 0.5 * (1 + math.erf((math.log(level / (1 - level)) - mean) / std / math.sqrt(2)))
        assert (sigma < level).float().mean().item() == pytest.approx(expected, abs=2e-4)


def test_logit_normal_serves_diffusion_too() -> None:
    config = ObjectiveConfig(timestep_sampling="logit_normal")
    timesteps = timesteps_from_uniforms(config, NoiseConfig(), torch.tensor([0.0, 0.25, 0.5, 0.999]))
    assert timesteps.dtype == torch.int64 and timesteps[2] == 500
    assert (timesteps.diff() > 0).all()


def test_the_flow_shift_moves_timesteps_to_the_noisy_end() -> None:
    shifted = NoiseConfig(schedule="flow", prediction="flow", flow_shift=3.0)
    timesteps = timesteps_from_uniforms(ObjectiveConfig(), shifted, torch.tensor([0.5]))
    assert timesteps.item() == pytest.approx(750)  # 3 * 0.5 / (1 + 2 * 0.5)


def test_a_timestep_depends_on_its_own_uniform_only() -> None:
    uniforms = torch.rand(6, generator=torch.Generator().manual_seed(0))
    config = ObjectiveConfig(timestep_sampling="logit_normal")
    together = timesteps_from_uniforms(config, FLOW, uniforms)
    alone = torch.cat([timesteps_from_uniforms(config, FLOW, uniform[None]) for uniform in uniforms])
    assert torch.equal(together, alone)


def test_the_loss_by_hand() -> None:
    output, target = torch.zeros(2, 1, 1, 2), torch.tensor([[[[1.0, 3.0]]], [[[0.0, -2.0]]]])
    weights = torch.tensor([1.0, 10.0])
    torch.testing.assert_close(diffusion_loss(output, target, weights), torch.tensor([5.0, 20.0]))
    torch.testing.assert_close(diffusion_loss(output, target, weights, "l1"), torch.tensor([2.0, 10.0]))


def test_the_loss_is_taken_in_float32() -> None:
    output = torch.full((1, 1, 1, 1), 300.0, dtype=torch.float16)  # its square overflows float16
    loss = diffusion_loss(output, torch.zeros_like(output), torch.ones(1))
    assert loss.dtype == torch.float32 and loss.item() == 90_000


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"weighting": "snr"}, "weighting"),
        ({"timestep_sampling": "cosine"}, "timestep_sampling"),
        ({"loss": "huber"}, "loss"),
        ({"min_snr_gamma": 0.0}, "min_snr_gamma"),
        ({"min_snr_floor": 6.0}, "min_snr_floor"),
        ({"min_snr_floor": -1.0}, "min_snr_floor"),
        ({"logit_std": 0.0}, "logit_std"),
    ],
)
def test_wrong_values_are_refused(values: dict[str, Any], field: str) -> None:
    with pytest.raises(ValueError, match=rf"^{field}: found .*; allowed is .*; "):
        ObjectiveConfig(**values)

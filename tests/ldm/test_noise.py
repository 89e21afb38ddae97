"""Schedules against diffusers and closed forms; conversions as round trips."""

from __future__ import annotations

import itertools
import math
from typing import Any, get_args

import diffusers
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ldm.noise import (
    NoiseConfig,
    NoiseLevels,
    NoiseSchedule,
    PredictionType,
    add_noise,
    beta_arguments,
    convert,
    shift_sigma,
    to_noise,
    to_x0,
    training_target,
)

PREDICTIONS = get_args(PredictionType)
DIFFUSION = ("linear", "scaled_linear", "cosine")


def schedule_of(**values: Any) -> NoiseSchedule:
    return NoiseSchedule.from_config(NoiseConfig(**values))


def closed_form(config: NoiseConfig) -> torch.Tensor:
    """alphas_cumprod in float64 from the papers' formulas."""
    steps = torch.arange(config.timesteps, dtype=torch.float64)
    if config.schedule == "cosine":  # arXiv 2102.09672, eq. 17, with betas clipped at 0.999

        def curve(t: torch.Tensor) -> torch.Tensor:
            return torch.cos((t / config.timesteps + 0.008) / 1.008 * math.pi / 2) ** 2

        betas = (1 - curve(steps + 1) / curve(steps)).clamp(max=0.999)
    else:
        power = 0.5 if config.schedule == "scaled_linear" else 1.0
        low, high = config.beta_start**power, config.beta_end**power
        betas = (low + (high - low) * steps / (config.timesteps - 1)) ** (1 / power)
    product = torch.cumprod(1 - betas, 0)
    if not config.zero_terminal_snr:
        return product
    root = product.sqrt()  # arXiv 2305.08891, algorithm 1
    return ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("name", DIFFUSION)
def test_the_schedule_is_the_closed_form(name: str, zero_snr: bool) -> None:
    config = NoiseConfig(schedule=name, zero_terminal_snr=zero_snr)
    table = NoiseSchedule.from_config(config).alphas_cumprod
    assert table is not None and table.dtype == torch.float32
    torch.testing.assert_close(table.double(), closed_form(config), rtol=2e-4, atol=1e-6)


@pytest.mark.parametrize("scheduler", ["DDPMScheduler", "DDIMScheduler"])
@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [("linear", "linear"), ("scaled_linear", "scaled_linear"), ("cosine", "squaredcos_cap_v2")],
)
def test_the_schedule_is_diffusers_to_the_bit(ours: str, theirs: str, zero_snr: bool, scheduler: str) -> None:
    reference = getattr(diffusers, scheduler)(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule=theirs,
        rescale_betas_zero_snr=zero_snr,
    )
    schedule = schedule_of(schedule=ours, zero_terminal_snr=zero_snr)
    assert torch.equal(schedule.alphas_cumprod, reference.alphas_cumprod)


@pytest.mark.parametrize(
    "scheduler", ["DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "EulerDiscreteScheduler"]
)
def test_every_diffusers_scheduler_takes_the_beta_arguments(scheduler: str) -> None:
    config = NoiseConfig(schedule="scaled_linear", timesteps=500)
    reference = getattr(diffusers, scheduler)(**beta_arguments(config))
    assert torch.equal(NoiseSchedule.from_config(config).alphas_cumprod, reference.alphas_cumprod)


@pytest.mark.parametrize("name", DIFFUSION)
def test_adding_noise_and_velocity_are_diffusers(name: str) -> None:
    schedule = schedule_of(schedule=name)
    reference = diffusers.DDPMScheduler(**beta_arguments(schedule.config))
    x_0, noise = torch.randn(2, 5, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    timesteps = torch.tensor([0, 1, 500, 998, 999])
    levels = schedule.levels(timesteps)
    torch.testing.assert_close(
        schedule.add_noise(x_0, noise, timesteps), reference.add_noise(x_0, noise, timesteps), rtol=0, atol=1e-6
    )
    torch.testing.assert_close(
        training_target("v_prediction", x_0, noise, levels),
        reference.get_velocity(x_0, noise, timesteps),
        rtol=0,
        atol=1e-6,
    )


def test_flow_is_the_straight_line_of_diffusers() -> None:
    schedule = schedule_of(schedule="flow", prediction="flow")
    reference = diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000)
    x_0, noise = torch.randn(2, 3, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    timesteps = reference.timesteps[torch.tensor([0, 400, 999])]
    expected = reference.scale_noise(x_0, timesteps, noise)
    torch.testing.assert_close(schedule.add_noise(x_0, noise, timesteps), expected)


def test_flow_begins_in_data_and_ends_in_noise() -> None:
    schedule = schedule_of(schedule="flow", prediction="flow", timesteps=100)
    levels = schedule.levels(torch.tensor([0.0, 25.0, 100.0]))
    assert levels.sigma.flatten().tolist() == [0.0, 0.25, 1.0]
    assert levels.alpha.flatten().tolist() == [1.0, 0.75, 0.0]


@pytest.mark.parametrize(
    ("name", "prediction", "timestep"),
    [("linear", "epsilon", 300), ("cosine", "v_prediction", 700), ("flow", "flow", 400.0)],
)
def test_noising_has_the_closed_forms_mean_and_variance(name: str, prediction: str, timestep: float) -> None:
    schedule = schedule_of(schedule=name, prediction=prediction)
    timesteps = torch.tensor([timestep])
    levels = schedule.levels(timesteps)
    count = 400_000
    noise = torch.randn(1, 1, 1, count, generator=torch.Generator().manual_seed(1))
    x_t = schedule.add_noise(torch.full_like(noise, 3.0), noise, timesteps)
    sigma = levels.sigma.item()
    assert x_t.mean().item() == pytest.approx(3 * levels.alpha.item(), abs=5 * sigma / math.sqrt(count))
    assert x_t.var().item() == pytest.approx(sigma**2, rel=5 * math.sqrt(2 / count))


@pytest.mark.parametrize("name", DIFFUSION)
def test_diffusion_keeps_the_variance(name: str) -> None:
    levels = schedule_of(schedule=name).levels(torch.arange(1000))
    torch.testing.assert_close(levels.alpha.square() + levels.sigma.square(), torch.ones(1000, 1, 1, 1))


def test_zero_terminal_snr_is_zero_at_the_last_step_only() -> None:
    snr = schedule_of(zero_terminal_snr=True).snr(torch.arange(1000))
    assert snr[-1] == 0 and (snr[:-1] > 0).all()
    assert (snr.diff() < 0).all()


@settings(max_examples=60, deadline=None)
@given(
    source=st.sampled_from(PREDICTIONS),
    target=st.sampled_from(PREDICTIONS),
    alpha=st.floats(0.05, 1.0),
    sigma=st.floats(0.05, 1.0),
    seed=st.integers(0, 2**31),
)
def test_every_prediction_converts_to_every_other(
    source: PredictionType, target: PredictionType, alpha: float, sigma: float, seed: int
) -> None:
    """On any levels, those of diffusion and flow among them."""
    x_0, noise = torch.randn(2, 2, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    levels = NoiseLevels(
        alpha=torch.full((2, 1, 1, 1), alpha, dtype=torch.float64),
        sigma=torch.full((2, 1, 1, 1), sigma, dtype=torch.float64),
    )
    x_t = add_noise(x_0, noise, levels)
    output = training_target(source, x_0, noise, levels)
    torch.testing.assert_close(to_x0(source, output, x_t, levels), x_0)
    torch.testing.assert_close(to_noise(source, output, x_t, levels), noise)
    expected = training_target(target, x_0, noise, levels)
    torch.testing.assert_close(convert(source, target, output, x_t, levels), expected)


@pytest.mark.parametrize(("source", "target"), itertools.permutations(PREDICTIONS, 2))
def test_converting_there_and_back_changes_nothing(source: PredictionType, target: PredictionType) -> None:
    """For an arbitrary, imperfect output of a network, not only for the true one."""
    output, x_t = torch.randn(2, 3, 2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    levels = schedule_of(schedule="linear").levels(torch.tensor([10, 500, 990]))
    there = convert(source, target, output, x_t, levels)
    assert not torch.allclose(there, output)
    torch.testing.assert_close(convert(target, source, there, x_t, levels), output, rtol=1e-5, atol=1e-5)


def test_noise_is_added_in_the_type_of_the_latents() -> None:
    x_0 = torch.ones(1, 1, 1, 1, dtype=torch.bfloat16)
    assert schedule_of().add_noise(x_0, x_0, torch.tensor([5])).dtype == torch.bfloat16


def test_each_sample_has_its_own_level() -> None:
    schedule = schedule_of()
    timesteps = torch.tensor([3, 900])
    both = schedule.levels(timesteps)
    assert both.alpha.shape == (2, 1, 1, 1)
    assert both.alpha[1] == schedule.levels(timesteps[1:]).alpha[0]
    assert both.snr.shape == (2,)


def test_diffusion_refuses_fractional_timesteps() -> None:
    with pytest.raises(TypeError, match="whole"):
        schedule_of().levels(torch.tensor([1.5]))


def test_moving_the_schedule_leaves_the_first_alone() -> None:
    schedule = schedule_of()
    moved = schedule.to("meta")
    assert moved.alphas_cumprod.device.type == "meta" and schedule.alphas_cumprod.device.type == "cpu"
    assert schedule_of(schedule="flow", prediction="flow").to("meta").alphas_cumprod is None


@given(sigma=st.floats(0, 1), shift=st.floats(0.1, 10))
def test_the_shift_keeps_the_ends_and_is_undone_by_its_inverse(sigma: float, shift: float) -> None:
    value = torch.tensor(sigma, dtype=torch.float64)
    shifted = shift_sigma(value, shift)
    assert 0 <= shifted <= 1 + 1e-12
    torch.testing.assert_close(shift_sigma(shifted, 1 / shift), value)


def test_the_shift_is_diffusers() -> None:
    reference = diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=10, shift=3.0)
    plain = torch.arange(10, 0, -1) / 10
    torch.testing.assert_close(shift_sigma(plain, 3.0), reference.timesteps / 10)


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"schedule": "sqrt_linear"}, "schedule"),
        ({"prediction": "eps"}, "prediction"),
        ({"timesteps": 1}, "timesteps"),
        ({"beta_start": 0.0}, "beta_start"),
        ({"beta_start": 0.5, "beta_end": 0.1}, "beta_start"),
        ({"beta_end": 1.0}, "beta_start"),
        ({"schedule": "flow"}, "prediction"),
        ({"prediction": "flow"}, "prediction"),
        ({"schedule": "flow", "prediction": "flow", "zero_terminal_snr": True}, "zero_terminal_snr"),
        ({"prediction": "epsilon", "zero_terminal_snr": True}, "zero_terminal_snr"),
        ({"flow_shift": 3.0}, "flow_shift"),
        ({"schedule": "flow", "prediction": "flow", "flow_shift": 0.0}, "flow_shift"),
    ],
)
def test_what_cannot_work_is_refused_by_the_fields_name(values: dict[str, Any], field: str) -> None:
    with pytest.raises(ValueError, match=f"^{field}: found .*; allowed|^{field}: found .*; .*; ") as error:
        NoiseConfig(**values)
    assert "\n" not in str(error.value)


def test_flow_has_no_betas() -> None:
    with pytest.raises(ValueError, match=r"^schedule: found flow"):
        beta_arguments(NoiseConfig(schedule="flow", prediction="flow"))

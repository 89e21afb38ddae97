from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor

from conditioning.conditions import Conditions
from ldm.errors import UserError
from ldm.guidance import Denoiser
from ldm.noise import NoiseConfig, NoiseSchedule, to_noise, training_target
from ldm.sampling import (
    FLOW_SCHEDULERS,
    SCHEDULERS,
    initial_latents,
    make_scheduler,
    noise_config_of,
    sample,
    scheduler_name,
    set_timesteps,
)

FLOW = NoiseConfig(schedule="flow", prediction="flow")
SHIFTED = replace(FLOW, flow_shift=3.0)
ZERO_SNR = NoiseConfig(schedule="scaled_linear", zero_terminal_snr=True)
DIFFUSION = [
    NoiseConfig(schedule=schedule, prediction=prediction)  # type: ignore[arg-type]
    for schedule, prediction in product(["linear", "scaled_linear", "cosine"], ["epsilon", "v_prediction", "sample"])
]
CASES = [
    *[(name, config) for name in SCHEDULERS for config in DIFFUSION],
    *[(name, ZERO_SNR) for name in SCHEDULERS if name != "heun"],
    *[(name, config) for name in FLOW_SCHEDULERS for config in (FLOW, SHIFTED)],
]


def generators(count: int, first: int = 0) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(first + i) for i in range(count)]


def perfect_denoiser(config: NoiseConfig, x_0: Tensor) -> Denoiser:
    """Knows x_0, and predicts what belongs to it from any x_t."""
    return optimal_denoiser(config, lambda x_t, alpha, sigma: x_0)


def gaussian_denoiser(config: NoiseConfig, mean: float, std: float) -> Denoiser:
    """The least-squares denoiser of data N(mean, std^2): E[x_0 | x_t], a linear function of x_t."""

    def expected_x0(x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return mean + alpha * std**2 / ((alpha * std) ** 2 + sigma**2) * (x_t - alpha * mean)

    return optimal_denoiser(config, expected_x0)


def optimal_denoiser(config: NoiseConfig, expected_x0) -> Denoiser:  # type: ignore[no-untyped-def]
    schedule = NoiseSchedule.from_config(config)

    def denoiser(x_t: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
        levels = schedule.levels(timesteps if config.schedule == "flow" else timesteps.long())
        x_0 = expected_x0(x_t, levels.alpha, levels.sigma)
        return training_target(config.prediction, x_0, to_noise("sample", x_0, x_t, levels), levels)

    return denoiser


def run(name: str, config: NoiseConfig, denoiser: Denoiser, noise: Tensor, steps: int) -> Tensor:
    return sample(denoiser, make_scheduler(name, config), noise, Conditions(), steps, generators(len(noise)))


@pytest.mark.parametrize(("name", "config"), CASES)
def test_a_perfect_denoiser_gives_x_0(name: str, config: NoiseConfig) -> None:
    x_0 = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    result = run(name, config, perfect_denoiser(config, x_0), initial_latents(generators(2), (4, 8, 8)), 25)
    # The multistep schedulers cut flow's timesteps to whole numbers: the network is told a slightly wrong noise level.
    rounded = config.schedule == "flow" and name in ("dpm++", "unipc")
    torch.testing.assert_close(result, x_0, rtol=0, atol=5e-3 if rounded else 1e-4)


@pytest.mark.parametrize("steps", [10, 20, 25, 30, 40, 50, 100])
def test_ddim_is_exact_for_the_step_counts_that_its_docstring_promises(steps: int) -> None:
    config = NoiseConfig(schedule="scaled_linear")
    x_0 = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(5))
    result = run("ddim", config, perfect_denoiser(config, x_0), torch.zeros_like(x_0), steps)
    torch.testing.assert_close(result, x_0, rtol=0, atol=1e-5)


@pytest.mark.parametrize("config", [NoiseConfig(), FLOW], ids=["cosine", "flow"])
@pytest.mark.parametrize("name", [name for name in SCHEDULERS if name != "ddpm"])
def test_ode_solvers_converge_to_the_exact_solution_for_gaussian_data(name: str, config: NoiseConfig) -> None:
    """With data N(m, s^2), pure noise z flows to m + s z along the probability-flow ODE (arXiv 2011.13456)."""
    if config is FLOW and name not in FLOW_SCHEDULERS:
        pytest.skip("no flow in this scheduler")
    mean, std = 0.7, 0.4
    noise = initial_latents(generators(1), (1, 32, 32))
    exact = mean + std * noise
    denoiser = gaussian_denoiser(config, mean, std)
    few, many = ((run(name, config, denoiser, noise, n) - exact).abs().max().item() for n in (20, 100))
    assert many < few / 2 or many < 0.01
    assert many < 0.1 if name in ("ddim", "euler") else many < 0.03
    result = run(name, config, denoiser, noise, 100)
    assert abs(result.mean() - exact.mean()) < 0.02
    assert abs(result.std() / exact.std() - 1) < 0.05


def test_second_order_is_closer_than_first_order() -> None:
    config = NoiseConfig()
    noise = initial_latents(generators(1), (1, 32, 32))
    denoiser = gaussian_denoiser(config, 0.7, 0.4)
    error = {name: (run(name, config, denoiser, noise, 20) - 0.7 - 0.4 * noise).std() for name in SCHEDULERS}
    assert max(error["dpm++"], error["unipc"], error["heun"]) < min(error["ddim"], error["euler"])


@pytest.mark.parametrize("config", [NoiseConfig(), ZERO_SNR], ids=["cosine", "zero terminal SNR"])
def test_ddpm_samples_gaussian_data(config: NoiseConfig) -> None:
    mean, std, count = 0.7, 0.4, 64 * 64
    noise = initial_latents(generators(1), (1, 64, 64))
    result = run("ddpm", config, gaussian_denoiser(config, mean, std), noise, 250)
    assert abs(result.mean() - mean) < 5 * std / count**0.5
    assert abs(result.std() / std - 1) < 0.06  # 5 standard errors of a standard deviation, and the discretisation


@pytest.mark.parametrize(("name", "config"), [case for case in CASES if case[1].schedule != "flow"])
def test_schedulers_have_the_noise_of_the_training(name: str, config: NoiseConfig) -> None:
    expected = NoiseSchedule.from_config(config).alphas_cumprod
    found = make_scheduler(name, config).alphas_cumprod
    assert expected is not None and torch.equal(found[:-1], expected[:-1])
    assert abs(found[-1] - expected[-1]) <= 2**-24  # diffusers' stand-in for zero, where sigma is divided by it


@pytest.mark.parametrize(("name", "config"), CASES)
def test_name_and_noise_are_read_back_from_a_scheduler(name: str, config: NoiseConfig) -> None:
    scheduler = make_scheduler(name, config)
    assert scheduler_name(scheduler) == name
    assert noise_config_of(scheduler) == config
    assert noise_config_of(type(scheduler).from_config(scheduler.config)) == config


@pytest.mark.parametrize("name", SCHEDULERS)
def test_sampling_starts_at_the_noisiest_timestep(name: str) -> None:
    timesteps = set_timesteps(make_scheduler(name, NoiseConfig(schedule="scaled_linear")), 10)
    assert timesteps[0] == 999
    assert len(timesteps) == (19 if name == "heun" else 10)


def test_heun_avoids_the_enormous_last_sigma_of_the_cosine_schedule() -> None:
    scheduler = make_scheduler("heun", NoiseConfig())
    set_timesteps(scheduler, 20)
    assert scheduler.sigmas.max() < 100


def test_flow_euler_divides_the_way_evenly() -> None:
    assert set_timesteps(make_scheduler("euler", FLOW), 4).tolist() == [1000, 750, 500, 250]


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("heun", ZERO_SNR, "heun for a model with zero terminal SNR; allowed is ddpm, ddim, euler, dpm\\+\\+, unipc"),
        ("ddim", FLOW, "ddim for a flow model; allowed is euler, heun, dpm\\+\\+, unipc"),
        ("ddpm", FLOW, "ddpm for a flow model"),
        ("eular", NoiseConfig(), "'eular'; allowed is .*; did you mean euler\\?"),
    ],
)
def test_impossible_schedulers_are_refused_with_what_is_possible(name: str, config: NoiseConfig, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_scheduler(name, config)


@pytest.mark.parametrize(("steps", "message"), [(0, "1 to 1000"), (1001, "1 to 1000"), (61, "take 60 or 62")])
def test_impossible_step_counts_are_refused(steps: int, message: str) -> None:
    with pytest.raises(UserError, match=f"num_inference_steps: found {steps}.*{message}"):
        set_timesteps(make_scheduler("ddim", NoiseConfig()), steps)


def test_explicit_betas_are_refused() -> None:
    scheduler = SCHEDULERS["ddim"](trained_betas=[0.1, 0.2, 0.3])
    with pytest.raises(UserError, match="DDIMScheduler: trained_betas: found a list"):
        noise_config_of(scheduler)


def test_initial_noise_is_the_same_alone_and_in_a_batch() -> None:
    together = initial_latents(generators(8), (3, 5, 7))
    for i in range(8):
        assert torch.equal(together[i : i + 1], initial_latents(generators(1, first=i), (3, 5, 7)))
    assert torch.equal(together[3], torch.randn(1, 3, 5, 7, generator=torch.Generator().manual_seed(3))[0])


@pytest.mark.parametrize("name", SCHEDULERS)
def test_an_image_is_the_same_alone_and_in_a_batch(name: str) -> None:
    """Bit for bit, with a denoiser that is itself independent of the batch."""
    config = NoiseConfig()
    denoiser, scheduler = gaussian_denoiser(config, 0.2, 0.5), make_scheduler(name, config)
    noise = initial_latents(generators(8), (4, 8, 8))
    together = sample(denoiser, scheduler, noise, Conditions(), 7, generators(8))
    alone = sample(denoiser, scheduler, noise[5:6], Conditions(), 7, generators(1, first=5))
    assert torch.equal(together[5:6], alone)
    assert not torch.equal(together[4:5], alone)


@pytest.mark.parametrize(("name", "config"), [case for case in CASES if case[1] in (NoiseConfig(), FLOW)])
def test_a_scheduler_may_be_used_again(name: str, config: NoiseConfig) -> None:
    noise = initial_latents(generators(2), (4, 8, 8))
    denoiser, scheduler = gaussian_denoiser(config, 0.2, 0.5), make_scheduler(name, config)
    first = sample(denoiser, scheduler, noise, Conditions(), 6, generators(2))
    sample(denoiser, scheduler, noise, Conditions(), 9, generators(2))
    assert torch.equal(sample(denoiser, scheduler, noise, Conditions(), 6, generators(2)), first)


def test_the_callback_sees_every_step_and_may_change_the_latents() -> None:
    seen: list[tuple[int, int]] = []

    def callback(step: int, t: Tensor, latents: Tensor) -> Tensor | None:
        seen.append((step, int(t)))
        return torch.full_like(latents, 7.0) if step == 3 else None

    noise = initial_latents(generators(1), (4, 8, 8))
    before = noise.clone()
    denoiser = gaussian_denoiser(NoiseConfig(), 0, 1)
    result = sample(denoiser, make_scheduler("ddim", NoiseConfig()), noise, Conditions(), 4, generators(1), callback)
    assert seen == [(0, 999), (1, 749), (2, 499), (3, 249)]
    assert (result == 7).all()
    assert torch.equal(noise, before)

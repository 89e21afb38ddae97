"""The way between two latents, and inversion against solutions known in closed form."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from conditioning.conditions import Conditions
from ldm.errors import UserError
from ldm.guidance import Denoiser
from ldm.interpolation import denoise_deterministic, fractions, invert, lerp, slerp
from ldm.noise import NoiseConfig, NoiseSchedule, training_target
from ldm.sampling import make_scheduler, sample, set_timesteps
from ldm.unet import UNetConfig, build_unet, denoise

COSINE = NoiseConfig(schedule="cosine")
STABLE_DIFFUSION = NoiseConfig(schedule="scaled_linear", prediction="epsilon")
ZERO_SNR = NoiseConfig(schedule="cosine", zero_terminal_snr=True)
FLOW = NoiseConfig(schedule="flow", prediction="flow")
CONFIGS = {
    "cosine v": COSINE,
    "cosine sample": replace(COSINE, prediction="sample"),
    "Stable Diffusion": STABLE_DIFFUSION,
    "zero terminal SNR v": ZERO_SNR,
    "zero terminal SNR sample": replace(ZERO_SNR, prediction="sample"),
    "flow": FLOW,
}
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
MEAN = 0.3
STDS = torch.tensor([0.3, 0.7, 1.0, 2.0]).view(1, 4, 1, 1)
"""One standard deviation a channel: nearly flat, nearly unit, unit and wide data."""

shares = st.floats(0, 1)
seeds = st.integers(0, 2**31)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def data(seed: int = 0) -> Tensor:
    return MEAN + STDS * random(2, 4, 6, 6, seed=seed)


def gaussian_denoiser(config: NoiseConfig) -> Denoiser:
    """The least-squares denoiser of data N(MEAN, STDS^2): a linear E[x_0 | x_t], in the form of the prediction."""
    schedule = NoiseSchedule.from_config(config)

    def denoiser(x_t: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
        assert timesteps.shape == (len(x_t),)
        levels = schedule.levels(timesteps)
        alpha, sigma = levels.alpha, levels.sigma
        x_0 = MEAN + alpha * STDS**2 / ((alpha * STDS) ** 2 + sigma**2) * (x_t - alpha * MEAN)
        return training_target(config.prediction, x_0, (x_t - alpha * x_0) / sigma, levels)

    return denoiser


def exact_noise(config: NoiseConfig, x_0: Tensor, t: Tensor) -> Tensor:
    """Where the ODE itself carries x_0: the standard score is kept while the spread grows to that of x_t."""
    levels = NoiseSchedule.from_config(config).levels(t.view(1))
    spread = ((levels.alpha * STDS) ** 2 + levels.sigma**2).sqrt()
    return levels.alpha * MEAN + spread / STDS * (x_0 - MEAN)


def timesteps_of(config: NoiseConfig, steps: int) -> Tensor:
    return set_timesteps(make_scheduler("euler" if config.schedule == "flow" else "ddim", config), steps)


def rms(tensor: Tensor) -> float:
    return float(tensor.square().mean().sqrt())


def backwards(config: NoiseConfig, x_0: Tensor, steps: int, refinements: int = 2) -> Tensor:
    schedule, timesteps = NoiseSchedule.from_config(config), timesteps_of(config, steps)
    denoiser = gaussian_denoiser(config)
    return invert(denoiser, schedule, config.prediction, x_0, Conditions(), timesteps, refinements)


def forwards(config: NoiseConfig, noise: Tensor, steps: int) -> Tensor:
    schedule, timesteps = NoiseSchedule.from_config(config), timesteps_of(config, steps)
    return denoise_deterministic(gaussian_denoiser(config), schedule, config.prediction, noise, Conditions(), timesteps)


# --- interpolation


@given(seeds, st.booleans())
def test_slerp_is_exact_at_both_ends(seed: int, batched: bool) -> None:
    a, b = random(2, 3, 4, 2, 5, seed=seed)
    if not batched:
        a, b = a[0], b[0]
    assert torch.equal(slerp(a, b, 0), a) and torch.equal(slerp(a, b, 1), b)


@given(seeds, shares)
def test_slerp_keeps_equal_norms(seed: int, t: float) -> None:
    a, b = random(2, 3, 4, 2, 2, seed=seed)
    b = b * (a.flatten(1).norm(dim=1) / b.flatten(1).norm(dim=1)).view(3, 1, 1, 1)
    torch.testing.assert_close(slerp(a, b, t).flatten(1).norm(dim=1), a.flatten(1).norm(dim=1), rtol=1e-5, atol=0)


@given(seeds, shares)
def test_slerp_is_the_same_from_the_other_end(seed: int, t: float) -> None:
    a, b = random(2, 3, 4, 2, 2, seed=seed)
    torch.testing.assert_close(slerp(a, b, t), slerp(b, a, 1 - t), rtol=1e-5, atol=1e-6)


@given(seeds, shares)
def test_slerp_turns_evenly(seed: int, t: float) -> None:
    a, b = torch.nn.functional.normalize(random(2, 16, seed=seed).double(), dim=1).view(2, 4, 2, 2)
    whole = torch.acos((a * b).sum())
    between = slerp(a, b, t)
    torch.testing.assert_close(torch.acos((a * between).sum().clamp(-1, 1)), t * whole, rtol=0, atol=1e-6)


@given(seeds, shares)
def test_every_sample_of_a_batch_has_its_own_arc(seed: int, t: float) -> None:
    a, b = random(2, 3, 4, 2, 2, seed=seed)
    b[1] = a[1]  # parallel beside others that are not
    together = slerp(a, b, t)
    for i in range(3):
        torch.testing.assert_close(together[i], slerp(a[i], b[i], t), rtol=0, atol=0)


@given(seeds, shares, st.floats(-9, -3))
def test_slerp_passes_smoothly_into_the_straight_line(seed: int, t: float, exponent: float) -> None:
    a, difference = random(2, 4, 2, 2, seed=seed)
    b = a + 10**exponent * difference
    torch.testing.assert_close(slerp(a, b, t), lerp(a, b, t), rtol=1e-5, atol=1e-5)
    assert torch.equal(slerp(a, torch.zeros_like(a), 0.25), lerp(a, torch.zeros_like(a), 0.25))


def test_slerp_on_a_quarter_circle() -> None:
    east, north = torch.eye(2).view(2, 2, 1, 1)
    expected = torch.tensor([math.cos(math.pi / 6), math.sin(math.pi / 6)]).view(2, 1, 1)
    torch.testing.assert_close(slerp(east, north, 1 / 3), expected)


@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=4, max_size=4), shares)
def test_lerp_is_exact_at_both_ends_and_between_them_in_between(values: list[float], t: float) -> None:
    a, b = torch.tensor(values).view(2, 1, 2, 1)
    assert torch.equal(lerp(a, b, 0), a) and torch.equal(lerp(a, b, 1), b)
    slack = 1e-6 * (a.abs() + b.abs())
    between = lerp(a, b, t)
    assert ((torch.minimum(a, b) - slack <= between) & (between <= torch.maximum(a, b) + slack)).all()


@given(st.integers(2, 200))
def test_fractions_are_even_and_hold_both_ends(frames: int) -> None:
    found = fractions(frames)
    assert len(found) == frames and found[0] == 0 and found[-1] == 1
    assert found == pytest.approx(torch.linspace(0, 1, frames, dtype=torch.float64).tolist(), abs=1e-12)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fractions(1), "frames: found 1; allowed is 2 or more"),
        (lambda: lerp(torch.zeros(1, 7, 3), torch.zeros(1, 8, 3), 0.5), r"shapes \(1, 7, 3\) and \(1, 8, 3\); allowed"),
        (lambda: slerp(torch.ones(4, 8, 8), torch.ones(4, 8, 9), 0.5), r"shapes \(4, 8, 8\) and \(4, 8, 9\)"),
        (lambda: slerp(torch.ones(4, 8, 8), torch.ones(4, 8, 8), 1.5), "a share of 1.5; allowed is 0"),
        (lambda: slerp(torch.ones(4, 8, 8), torch.ones(4, 8, 8), math.nan), "a share of nan"),
        (lambda: slerp(torch.ones(4, 8), torch.ones(4, 8), 0.5), r"found shape \(4, 8\); allowed is \[C, h, w\]"),
        (lambda: slerp(torch.ones(4, 2, 2), -torch.ones(4, 2, 2), 0.5), "exact opposites.*take another seed"),
    ],
)
def test_impossible_interpolations_are_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        call()


# --- denoising and inversion


@pytest.mark.parametrize("config", [COSINE, STABLE_DIFFUSION, ZERO_SNR, FLOW, replace(FLOW, flow_shift=3.0)])
def test_denoising_is_what_the_sampler_does(config: NoiseConfig) -> None:
    """diffusers' DDIM at eta 0 and its Euler for flow, which have their own bookkeeping of timesteps."""
    scheduler = make_scheduler("euler" if config.schedule == "flow" else "ddim", config)
    noise = random(2, 4, 6, 6)
    generators = [torch.Generator(), torch.Generator()]
    expected = sample(gaussian_denoiser(config), scheduler, noise, Conditions(), 10, generators)
    found = denoise_deterministic(
        gaussian_denoiser(config),
        NoiseSchedule.from_config(config),
        config.prediction,
        noise,
        Conditions(),
        set_timesteps(scheduler, 10),
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@every_config
def test_both_ways_converge_to_the_exact_ode(config: NoiseConfig) -> None:
    """First order: three times the steps, a third of the error (a little less where the first step dominates)."""
    x_0 = data()
    exact = exact_noise(config, x_0, timesteps_of(config, 1)[0])
    for way, start, end in ((backwards, x_0, exact), (forwards, exact, x_0)):
        coarse, fine = (rms(way(config, start, steps) - end) for steps in (50, 150))
        assert fine < 0.55 * coarse, way.__name__
        assert fine < 0.05, way.__name__


@every_config
def test_the_round_trip_gives_x_0_again(config: NoiseConfig) -> None:
    x_0 = data()
    for refinements, most in ((0, 0.05), (2, 2e-3), (6, 1e-4)):
        again = forwards(config, backwards(config, x_0, 50, refinements), 50)
        assert rms(again - x_0) < most, refinements


@settings(max_examples=10, deadline=None)
@given(st.sampled_from(list(CONFIGS.values())), seeds)
def test_noise_found_again_from_its_own_image(config: NoiseConfig, seed: int) -> None:
    noise = random(2, 4, 6, 6, seed=seed)
    found = backwards(config, forwards(config, noise, 50), 50, refinements=6)
    assert rms(found - noise) < 5e-3


@every_config
def test_unit_data_is_its_own_noise(config: NoiseConfig) -> None:
    """Data N(0, 1) stays N(0, 1) along variance-preserving noise: the ODE stands still, and one iteration is exact."""
    schedule, timesteps = NoiseSchedule.from_config(config), timesteps_of(config, 25)

    def denoiser(x_t: Tensor, t: Tensor, conditions: Conditions) -> Tensor:
        levels = schedule.levels(t)
        power = levels.alpha**2 + levels.sigma**2
        return training_target(config.prediction, levels.alpha * x_t / power, levels.sigma * x_t / power, levels)

    x_0 = random(2, 4, 6, 6)
    arguments = (denoiser, schedule, config.prediction)
    found = invert(*arguments, x_0, Conditions(), timesteps, refinements=0)
    again = denoise_deterministic(*arguments, found, Conditions(), timesteps)
    torch.testing.assert_close(again, x_0, rtol=0, atol=1e-4)


@pytest.mark.parametrize("refinements", [0, 1, 3])
def test_evaluations_conditions_and_timesteps(refinements: int) -> None:
    seen: list[int] = []
    given_conditions = Conditions(context=random(2, 3, 5))
    inner = gaussian_denoiser(COSINE)

    def denoiser(x_t: Tensor, t: Tensor, conditions: Conditions) -> Tensor:
        assert conditions is given_conditions and not torch.is_grad_enabled() and x_t.dtype == torch.float32
        seen.append(int(t[0]))
        return inner(x_t, t, conditions).to(torch.bfloat16)  # a network in half precision

    x_0, schedule = data().double(), NoiseSchedule.from_config(COSINE)
    before = x_0.clone()
    timesteps = torch.tensor([900, 500, 100])
    found = invert(denoiser, schedule, "v_prediction", x_0, given_conditions, timesteps, refinements)
    assert seen == [t for t in (100, 500, 900) for _ in range(1 + refinements)]
    assert found.dtype == torch.float32 and found.shape == x_0.shape and torch.equal(x_0, before)
    seen.clear()
    denoise_deterministic(denoiser, schedule, "v_prediction", found, given_conditions, timesteps)
    assert seen == [900, 500, 100]


@pytest.mark.parametrize("config", [ZERO_SNR, FLOW])
def test_a_network_is_inverted_and_more_refinements_are_better(config: NoiseConfig) -> None:
    """Random weights, predictions of standard deviation 1 that hang together with x_t in no useful way."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = build_unet(
            UNetConfig(channels=(16, 32), layers_per_block=1, attention=(False, True), heads=4, norm_groups=8),
            latent_channels=4,
            context_width=12,
            sample_size=8,
        ).eval()
    conditions, x_0 = Conditions(context=random(2, 5, 12, seed=1)), random(2, 4, 8, 8, seed=2)
    with torch.no_grad():
        spread = denoise(unet, x_0, torch.tensor([100, 800]), conditions).std()
        unet.conv_out.weight /= spread
        unet.conv_out.bias /= spread

    def denoiser(x_t: Tensor, t: Tensor, conditions: Conditions) -> Tensor:
        return denoise(unet, x_t, t, conditions)

    arguments = (denoiser, NoiseSchedule.from_config(config), config.prediction)
    timesteps = timesteps_of(config, 10)
    errors = []
    for refinements in (0, 2, 4):
        found = invert(*arguments, x_0, conditions, timesteps, refinements)
        errors.append(rms(denoise_deterministic(*arguments, found, conditions, timesteps) - x_0))
    assert errors[1] < 0.1 * errors[0] and errors[2] < 0.2 * errors[1]
    assert errors[1] < 0.02


def test_one_step_of_one_noise_level() -> None:
    """By hand: from timestep t the eps-denoiser 0 gives x_0 = x_t / alpha, so x_t = alpha x_0."""
    schedule, timesteps = NoiseSchedule.from_config(STABLE_DIFFUSION), torch.tensor([100])
    alpha = schedule.levels(timesteps).alpha
    x_0 = data()

    def nothing(x_t: Tensor, t: Tensor, conditions: Conditions) -> Tensor:
        return torch.zeros_like(x_t)

    arguments = (nothing, schedule, "epsilon")
    torch.testing.assert_close(denoise_deterministic(*arguments, alpha * x_0, Conditions(), timesteps), x_0)
    found = invert(*arguments, x_0, Conditions(), timesteps, refinements=20)
    torch.testing.assert_close(found, alpha * x_0, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "timesteps", "message"),
    [
        (COSINE, [], r"found \[\]; allowed is a list that goes down"),
        (COSINE, [100, 500, 900], r"found \[100, 500, 900\]; allowed is a list that goes down, one timestep a step"),
        (COSINE, [900, 900, 500], r"found \[900, 900, 500\]"),
        (COSINE, [[900, 500]], "allowed is a list that goes down"),
        (COSINE, list(range(0, 100, 10)), r"found \[0, 10, \.\.\. 90\]"),
        (COSINE, [1000, 500], "found 1000 down to 500; allowed is 0 to 999"),
        (COSINE, [500, -1], "found 500 down to -1; allowed is 0 to 999"),
        (FLOW, [1000.0, 0.0], "found 1000 down to 0; allowed is above 0 and up to 1000"),
        (FLOW, [1001.0, 500.0], "allowed is above 0 and up to 1000"),
    ],
)
def test_impossible_timesteps_are_refused(config: NoiseConfig, timesteps: list[float], message: str) -> None:
    arguments = (gaussian_denoiser(config), NoiseSchedule.from_config(config), config.prediction, data(), Conditions())
    for function in (invert, denoise_deterministic):
        with pytest.raises(UserError, match=message):
            function(*arguments, torch.tensor(timesteps))


@pytest.mark.parametrize("config", [COSINE, ZERO_SNR, FLOW])
def test_a_single_step_to_pure_noise_cannot_be_undone(config: NoiseConfig) -> None:
    with pytest.raises(UserError, match=r"one step from x_0 to pure noise.*take more steps"):
        backwards(config, data(), 1)


def test_what_else_is_refused() -> None:
    with pytest.raises(UserError, match="refinements: found -1; allowed is 0 or more"):
        backwards(COSINE, data(), 10, refinements=-1)
    schedule = NoiseSchedule.from_config(ZERO_SNR)
    with pytest.raises(UserError, match=r"found 999, pure noise, with prediction epsilon; .* begin at a lower"):
        invert(gaussian_denoiser(COSINE), schedule, "epsilon", data(), Conditions(), torch.tensor([999, 500]))
    with pytest.raises(UserError, match=r"did not settle.*guidance scale 1"):
        invert(lambda x, t, c: 1e4 * x**3, schedule, "v_prediction", data(), Conditions(), torch.tensor([800, 400]), 9)

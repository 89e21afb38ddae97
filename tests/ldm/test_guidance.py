"""Guidance against its closed formulas, and how often it asks the network."""

from __future__ import annotations

import itertools
import subprocess
import sys
from typing import Any, get_args

import diffusers
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from conditioning.conditions import CONDITIONS, Conditions
from ldm.errors import UserError
from ldm.guidance import (
    Guidance,
    GuidanceOptions,
    check_guidance_scale,
    needed_predictions,
    parse_guidance_scale,
    resolve_scales,
)
from ldm.noise import NoiseConfig, NoiseSchedule, PredictionType, convert, to_x0
from ldm.projected_guidance import ApgOptions, ProjectedGuidance, levels_at, limit_norm, project, rescale

SHAPE = (4, 3, 5)
OFF = ApgOptions(eta=1.0, norm_threshold=None, momentum=0.0)
NOISES = {
    "epsilon": NoiseConfig(prediction="epsilon", schedule="linear"),
    "v_prediction": NoiseConfig(prediction="v_prediction", zero_terminal_snr=True),
    "sample": NoiseConfig(prediction="sample", zero_terminal_snr=True),
    "flow": NoiseConfig(prediction="flow", schedule="flow"),
}
SCHEDULES = {name: NoiseSchedule.from_config(config) for name, config in NOISES.items()}
assert set(NOISES) == set(get_args(PredictionType))
SCALES = st.lists(st.sampled_from([0.0, 1.0, 1.5, 7.0]) | st.floats(0, 20), min_size=1, max_size=4)


class Chain:
    """n conditions whose predictions are a table of random numbers, and a network that looks them up in it.

    Link k (the first k conditions) of sample i is the context number k * batch + i. The latents and timesteps that come
    with it must be that sample's own.
    """

    def __init__(self, n: int, batch: int = 2, seed: int = 0, dtype: torch.dtype = torch.float32) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.table = torch.randn(n + 1, batch, *SHAPE, generator=generator).to(dtype)
        self.latents = torch.randn(batch, *SHAPE, generator=generator)
        links = [self.link(k, batch) for k in range(n + 1)]
        self.without, self.conditions = links[:-1], links[-1]
        self.batch = batch
        self.calls: list[list[int]] = []

    @staticmethod
    def link(k: int, batch: int) -> Conditions:
        numbers = torch.arange(k * batch, (k + 1) * batch, dtype=torch.float32)
        return Conditions(context=numbers.view(-1, 1, 1), class_embedding=numbers.view(-1, 1))

    def __call__(self, latents: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
        assert conditions.context is not None and conditions.class_embedding is not None
        assert len(latents) == len(timesteps) == len(conditions)
        rows = conditions.context.flatten().long()
        assert torch.equal(conditions.class_embedding.flatten().long(), rows)
        assert torch.equal(latents, self.latents[rows % self.batch])
        self.calls.append((rows // self.batch).tolist())
        return self.table.flatten(0, 1)[rows]

    def guided(
        self, scales: list[float], options: GuidanceOptions | None = None, name: str = "epsilon", timestep: float = 500
    ) -> Tensor:
        guidance = Guidance(self, self.without, scales, options, noise_schedule=SCHEDULES[name])
        return self.ask(guidance, timestep)

    def ask(self, guidance: Guidance, timestep: float = 500) -> Tensor:
        return guidance(self.latents, torch.tensor([timestep] * self.batch), self.conditions)


def coefficients(scales: list[float]) -> list[float]:
    return [left - right for left, right in itertools.pairwise([1.0, *scales, 0.0])]


# --- composition ---------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(scales=SCALES, batch=st.integers(1, 3), seed=st.integers(0, 1000))
def test_the_composition_is_the_closed_formula(scales: list[float], batch: int, seed: int) -> None:
    chain = Chain(len(scales), batch, seed)
    e = chain.table.double()
    nested = e[0] + sum(s * (e[k + 1] - e[k]) for k, s in enumerate(scales))
    weighed = sum(c * e[k] for k, c in enumerate(coefficients(scales)))
    torch.testing.assert_close(nested, weighed)
    torch.testing.assert_close(chain.guided(scales).double(), nested, rtol=1e-5, atol=1e-5 * (1 + max(scales)))


@settings(deadline=None)
@given(scales=SCALES, batch=st.integers(1, 3), extra=st.sampled_from(["none", "rescale", "apg"]))
def test_one_call_evaluates_what_has_a_coefficient_and_nothing_else(
    scales: list[float], batch: int, extra: str
) -> None:
    options = {
        "none": GuidanceOptions(),
        "rescale": GuidanceOptions(rescale=0.7),
        "apg": GuidanceOptions(apg=ApgOptions()),
    }[extra]
    chain = Chain(len(scales), batch)
    guidance = Guidance(chain, chain.without, scales, options, noise_schedule=SCHEDULES["epsilon"])
    chain.ask(guidance)
    expected = {k for k, c in enumerate(coefficients(scales)) if c != 0}
    expected |= {len(scales)} if extra != "none" else set()
    assert chain.calls == [[k for k in sorted(expected) for _ in range(batch)]]
    assert guidance.evaluations_per_step == len(expected)


@pytest.mark.parametrize("n", [0, 1, 2, 3, 4])
@pytest.mark.parametrize(
    "options", [None, GuidanceOptions(rescale=0.7), GuidanceOptions(apg=ApgOptions(), rescale=1.0, interval=(0.2, 0.9))]
)
def test_scale_one_everywhere_is_one_evaluation_and_no_guidance(n: int, options: GuidanceOptions | None) -> None:
    chain = Chain(n)
    assert torch.equal(chain.guided([1.0] * n, options), chain.table[n])
    assert chain.calls == [[n, n]]


@given(scale=st.floats(0, 30))
def test_one_condition_is_classifier_free_guidance(scale: float) -> None:
    chain = Chain(1)
    without, told = chain.table.double()
    # Ho & Salimans' own form: (1 + w) conditional - w unconditional, w = scale - 1
    torch.testing.assert_close(
        chain.guided([scale]).double(), scale * told - (scale - 1) * without, rtol=1e-5, atol=1e-5 * (1 + scale)
    )


def test_one_condition_is_diffusers_to_the_bit() -> None:
    chain = Chain(1)
    without, told = chain.table
    assert torch.equal(chain.guided([7.5]), without + 7.5 * (told - without))
    assert chain.calls == [[0, 0, 1, 1]]


@pytest.mark.parametrize("n", [2, 3, 4])
def test_equal_scales_guide_as_one_condition(n: int) -> None:
    chain = Chain(n)
    expected = chain.table[0] + 5 * (chain.table[-1] - chain.table[0])
    assert torch.equal(chain.guided([5.0] * n), expected)
    assert chain.calls == [[0, 0, n, n]]


def test_scale_zero_is_the_unconditional_prediction_alone() -> None:
    chain = Chain(2)
    assert torch.equal(chain.guided([0.0, 0.0]), chain.table[0])
    assert chain.calls == [[0, 0]]


def test_a_condition_kept_in_both_branches_costs_nothing() -> None:
    """Stable Diffusion's inpainting: mask and masked image everywhere, guidance by the text only."""
    chain = Chain(2)
    assert torch.equal(chain.guided([1.0, 6.0]), chain.table[1] + 6 * (chain.table[2] - chain.table[1]))
    assert chain.calls == [[1, 1, 2, 2]]


def test_without_conditions_the_network_is_asked_once() -> None:
    def network(latents: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
        return 2 * latents

    latents = torch.randn(3, *SHAPE)
    assert torch.equal(Guidance(network, [], [])(latents, torch.tensor([5, 5, 5]), Conditions()), 2 * latents)


def test_one_sample_of_conditions_serves_the_whole_batch() -> None:
    generator = torch.Generator().manual_seed(0)
    context = torch.randn(3, 1, 5, 6, generator=generator)
    latents = torch.randn(4, *SHAPE, generator=generator)

    def network(latents: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
        assert conditions.context is not None
        return latents.sin() * conditions.context.mean((1, 2)).view(-1, 1, 1, 1)

    links = [Conditions(context=part) for part in context]
    repeated = [link.repeat_interleave(4) for link in links]
    one, each = (
        Guidance(network, chain[:2], [3.0, 2.0])(latents, torch.tensor([5] * 4), chain[2])
        for chain in (links, repeated)
    )
    assert torch.equal(one, each)


@pytest.mark.parametrize(
    "options",
    [None, GuidanceOptions(rescale=0.5), GuidanceOptions(apg=ApgOptions(norm_threshold=2.0, momentum=-0.5))],
)
def test_a_sample_does_not_depend_on_its_batch(options: GuidanceOptions | None) -> None:
    generator = torch.Generator().manual_seed(0)
    context, latents = torch.randn(3, 6, 2, 2, generator=generator), torch.randn(6, *SHAPE, generator=generator)

    def network(latents: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
        assert conditions.context is not None
        return (latents * (1 + conditions.context.mean((1, 2)).view(-1, 1, 1, 1))).sin() + timesteps.view(
            -1, 1, 1, 1
        ) / 1e3

    def run(part: slice) -> Tensor:
        links = [Conditions(context=context[k, part]) for k in range(3)]
        guidance = Guidance(network, links[:2], [2.0, 5.0], options, noise_schedule=SCHEDULES["v_prediction"])
        timesteps = torch.arange(6)[part] * 100
        return guidance(latents[part], timesteps, links[2]) + guidance(latents[part], timesteps, links[2])

    together = run(slice(0, 6))
    for i in range(6):
        torch.testing.assert_close(together[i : i + 1], run(slice(i, i + 1)), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_outputs_are_combined_in_float32(dtype: torch.dtype) -> None:
    chain = Chain(3, dtype=dtype)
    guided = chain.guided([2.0, 3.0, 7.5])
    assert guided.dtype == torch.float32
    e = chain.table.double()
    expected = sum(c * e[k] for k, c in enumerate(coefficients([2.0, 3.0, 7.5])))
    torch.testing.assert_close(guided.double(), expected, rtol=1e-6, atol=1e-5)
    options = GuidanceOptions(apg=ApgOptions(norm_threshold=3.0), rescale=0.3)
    assert chain.guided([2.0, 3.0, 7.5], options).dtype == chain.guided([1.0] * 3).dtype == torch.float32


# --- interval ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("interval", "timestep", "inside"),
    [
        ((0.3, 0.7), 300, True),
        ((0.3, 0.7), 700, True),
        ((0.3, 0.7), 299, False),
        ((0.3, 0.7), 701, False),
        ((0.3, 0.7), 0, False),
        ((0.3, 0.7), 999, False),
        ((0.0, 1.0), 0, True),
        ((0.0, 1.0), 999, True),
        ((0.0, 0.0), 0, True),
        ((0.0, 0.0), 1, False),
    ],
)
def test_guidance_stays_in_its_interval_ends_included(
    interval: tuple[float, float], timestep: int, inside: bool
) -> None:
    chain = Chain(2)
    options = GuidanceOptions(interval=interval, rescale=0.5, apg=ApgOptions())
    guidance = Guidance(chain, chain.without, [2.0, 4.0], options, noise_schedule=SCHEDULES["epsilon"])
    output = chain.ask(guidance, timestep)
    assert chain.calls == ([[0, 0, 1, 1, 2, 2]] if inside else [[2, 2]])
    assert torch.equal(output, chain.table[2]) == (not inside)


@given(numerator=st.integers(1, 999))
def test_flow_timesteps_in_float32_meet_the_ends_too(numerator: int) -> None:
    end = numerator / 1000
    middle = torch.tensor([end * 1000])
    chain = Chain(1, batch=1)
    for direction in (-torch.inf, torch.inf):  # a sigma times T is often the neighbour of the whole number
        timestep = torch.nextafter(middle, torch.tensor(direction))
        for interval in ((end, 1.0), (0.0, end)):
            options = GuidanceOptions(interval=interval)
            guidance = Guidance(chain, chain.without, [3.0], options, noise_schedule=SCHEDULES["flow"])
            guidance(chain.latents, timestep, chain.conditions)
    assert chain.calls == [[0, 1]] * 4


def test_a_batch_on_both_sides_of_an_end_is_refused() -> None:
    chain = Chain(1)
    guidance = Guidance(
        chain, chain.without, [3.0], GuidanceOptions(interval=(0.5, 1.0)), noise_schedule=SCHEDULES["epsilon"]
    )
    with pytest.raises(ValueError, match="timesteps: found some in the guidance interval and some not"):
        guidance(chain.latents, torch.tensor([400, 600]), chain.conditions)


# --- rescale -------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(scales=SCALES.filter(lambda scales: set(scales) != {1.0}), phi=st.floats(0, 1), seed=st.integers(0, 1000))
def test_rescaling_is_the_papers(scales: list[float], phi: float, seed: int) -> None:
    """arXiv 2305.08891: x_rescaled = x_cfg std(x_pos) / std(x_cfg); x_final = phi x_rescaled + (1 - phi) x_cfg."""
    chain = Chain(len(scales), seed=seed)
    output = chain.guided(scales, GuidanceOptions(rescale=phi))
    e = chain.table.double()
    for i in range(chain.batch):
        x_cfg, x_pos = sum(c * e[k, i] for k, c in enumerate(coefficients(scales))), e[-1, i]
        rescaled = x_cfg * (x_pos.std() / x_cfg.std())
        final = phi * rescaled + (1 - phi) * x_cfg
        torch.testing.assert_close(output[i].double(), final, rtol=1e-4, atol=1e-4)


def test_rescaling_by_zero_is_the_identity_and_by_one_gives_the_conditional_deviation() -> None:
    guided, conditional = 7 * torch.randn(2, 3, *SHAPE) + 1
    assert torch.equal(rescale(guided, conditional, 0.0), guided)
    torch.testing.assert_close(rescale(guided, conditional, 1.0).std((1, 2, 3)), conditional.std((1, 2, 3)))


def test_rescaling_is_diffusers() -> None:
    from diffusers.guiders.guider_utils import rescale_noise_cfg

    guided, conditional = 7 * torch.randn(2, 3, *SHAPE)
    torch.testing.assert_close(rescale(guided, conditional, 0.7), rescale_noise_cfg(guided, conditional, 0.7))


def test_a_constant_prediction_is_left_as_it_is() -> None:
    flat = torch.full((1, *SHAPE), 3.0)
    assert torch.equal(rescale(flat, torch.randn(1, *SHAPE), 1.0), flat)


# --- adaptive projected guidance -----------------------------------------------------------------------------------

TIMESTEPS = [0, 1, 300, 999]


def noise_level(name: str, timestep: int) -> Any:
    return levels_at(SCHEDULES[name], torch.tensor([timestep] * 2))


@pytest.mark.parametrize("timestep", TIMESTEPS)
@pytest.mark.parametrize("name", NOISES)
@settings(deadline=None, max_examples=15)
@given(scales=SCALES)
def test_apg_that_changes_nothing_is_plain_guidance(name: str, timestep: int, scales: list[float]) -> None:
    """At every level: the noisiest (alpha = 0 with v and sample) and the cleanest (sigma = 0 with flow)."""
    chain = Chain(len(scales))
    projected = chain.guided(scales, GuidanceOptions(apg=OFF), name, timestep)
    plain = chain.guided(scales, None, name, timestep)
    torch.testing.assert_close(projected, plain, rtol=1e-5, atol=1e-5 * (1 + max(scales)))


def test_flow_ends_in_pure_noise_and_apg_with_it() -> None:
    chain = Chain(2)
    options = GuidanceOptions(apg=OFF)
    torch.testing.assert_close(chain.guided([2.0, 5.0], options, "flow", 1000.0), chain.guided([2.0, 5.0]))


@pytest.mark.parametrize("timestep", [1, 300, 999])
@pytest.mark.parametrize("name", NOISES)
def test_without_the_parallel_part_the_update_is_orthogonal_to_x_0(name: PredictionType, timestep: int) -> None:
    chain = Chain(3)
    apg = ApgOptions(eta=0.0, norm_threshold=3.0, momentum=0.0)
    guided = chain.guided([2.0, 5.0, 3.0], GuidanceOptions(apg=apg), name, timestep)
    levels = noise_level(name, timestep)
    x_0 = to_x0(name, chain.table[-1], chain.latents, levels).double().flatten(1)
    nothing = torch.zeros_like(guided)
    update = to_x0(name, guided - chain.table[-1], nothing, levels).double().flatten(1)
    assert (update.norm(dim=1) > 0.01).all()
    cosine = (update * x_0).sum(1) / update.norm(dim=1) / x_0.norm(dim=1)
    assert cosine.abs().max() < 1e-4


@pytest.mark.parametrize("name", NOISES)
@settings(deadline=None, max_examples=30)
@given(scales=SCALES.filter(lambda scales: set(scales) != {1.0}), threshold=st.floats(0.1, 20), eta=st.floats(0, 1))
def test_the_threshold_bounds_the_update_of_x_0(
    name: PredictionType, scales: list[float], threshold: float, eta: float
) -> None:
    chain = Chain(len(scales))
    apg = ApgOptions(eta=eta, norm_threshold=threshold, momentum=-0.5)
    guidance = Guidance(chain, chain.without, scales, GuidanceOptions(apg=apg), noise_schedule=SCHEDULES[name])
    levels = noise_level(name, 700)
    for _ in range(2):
        change = chain.ask(guidance, 700) - chain.table[-1]
        update = to_x0(name, change, torch.zeros_like(change), levels)
        strength = max(abs(scale - 1) for scale in scales)
        # The subtraction of the test itself loses digits where the update is far smaller than the prediction.
        assert update.flatten(1).norm(dim=1).max() <= strength * threshold * (1 + 1e-4) + 1e-4


def test_the_limit_shortens_only_what_is_too_long() -> None:
    change = torch.randn(2, *SHAPE)
    change = change / change.flatten(1).norm(dim=1).view(-1, 1, 1, 1) * torch.tensor([2.0, 8.0]).view(-1, 1, 1, 1)
    limited = limit_norm(change, 5.0)
    assert torch.equal(limited[0], change[0])
    torch.testing.assert_close(limited[1], change[1] * 5 / 8)
    assert torch.equal(limit_norm(torch.zeros(1, *SHAPE), 5.0), torch.zeros(1, *SHAPE))
    assert torch.equal(limit_norm(change, None), change)


@given(eta=st.floats(0, 2), length=st.floats(-3, 3))
def test_projecting_weighs_the_parallel_part_and_keeps_the_rest(eta: float, length: float) -> None:
    generator = torch.Generator().manual_seed(0)
    onto, other = torch.randn(2, 2, *SHAPE, dtype=torch.float64, generator=generator)
    orthogonal = other - onto * ((other * onto).sum((1, 2, 3)) / onto.square().sum((1, 2, 3))).view(-1, 1, 1, 1)
    projected = project(length * onto + orthogonal, onto, eta)
    torch.testing.assert_close(projected, eta * length * onto + orthogonal)
    assert project(other, torch.zeros_like(onto), eta).equal(other)  # no direction, so no parallel part


@given(momentum=st.floats(-0.99, 0.99), steps=st.integers(1, 5))
def test_momentum_is_the_papers_recursion(momentum: float, steps: int) -> None:
    """average_i = change_i + momentum average_{i-1}, so average_i = sum_j momentum^(i-j) change_j."""
    changes = torch.randn(steps, 2, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x_0, latents = torch.ones(2, 2, *SHAPE, dtype=torch.float64)
    apg = ProjectedGuidance(ApgOptions(eta=1.0, momentum=momentum), SCHEDULES["sample"])
    for i in range(steps):
        average = apg(changes[i], x_0, latents, torch.tensor([10, 10]))
        torch.testing.assert_close(average, sum(momentum ** (i - j) * changes[j] for j in range(i + 1)))


@pytest.mark.parametrize("name", NOISES)
def test_apg_is_diffusers_on_x_0_over_three_steps(name: PredictionType) -> None:
    from diffusers.guiders.adaptive_projected_guidance import MomentumBuffer, normalized_guidance

    apg = ApgOptions(eta=0.3, norm_threshold=4.0, momentum=-0.6)
    first = Chain(1)
    guidance = Guidance(first, first.without, [6.0], GuidanceOptions(apg=apg), noise_schedule=SCHEDULES[name])
    buffer = MomentumBuffer(-0.6)
    for timestep in (900, 600, 200):
        chain = Chain(1, seed=timestep)
        guidance.denoiser = chain
        levels = noise_level(name, timestep)
        without, told = (to_x0(name, output, chain.latents, levels) for output in chain.table)
        expected = normalized_guidance(told, without, 5.0, buffer, 0.3, 4.0, use_original_formulation=True)
        guided = to_x0(name, chain.ask(guidance, timestep), chain.latents, levels)
        torch.testing.assert_close(guided, expected, rtol=1e-4, atol=1e-4)


def test_momentum_of_another_run_is_refused() -> None:
    guidance = Guidance(
        Chain(1),
        Chain(1).without,
        [3.0],
        GuidanceOptions(apg=ApgOptions()),
        noise_schedule=SCHEDULES["epsilon"],
    )
    Chain(1).ask(guidance)
    other = Chain(1, batch=3)
    guidance.denoiser, guidance.without = other, tuple(other.without)
    with pytest.raises(ValueError, match="its momentum belongs to one sampling run"):
        other.ask(guidance)


@pytest.mark.parametrize("zero_snr", [False, True])
def test_levels_between_timesteps_are_those_of_diffusers_euler(zero_snr: bool) -> None:
    config = NoiseConfig(schedule="scaled_linear", zero_terminal_snr=zero_snr)
    euler = diffusers.EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        timestep_spacing="linspace",
        rescale_betas_zero_snr=zero_snr,
    )
    euler.set_timesteps(30)
    assert (euler.timesteps != euler.timesteps.round()).any()
    levels = levels_at(NoiseSchedule.from_config(config), euler.timesteps)
    theirs = euler.sigmas[:-1]
    angle = torch.atan2(levels.sigma, levels.alpha).flatten()
    # Rounding the timestep down would be 2e-3 off; diffusers' Euler has 2^-24 for zero SNR, which is 2.4e-4.
    torch.testing.assert_close(angle, theirs.atan(), rtol=0, atol=3e-4 if zero_snr else 2e-6)
    torch.testing.assert_close(levels.alpha.square() + levels.sigma.square(), torch.ones(30, 1, 1, 1))


def test_levels_at_whole_timesteps_are_the_tables() -> None:
    schedule, whole = SCHEDULES["v_prediction"], torch.tensor([0, 500, 999])
    table, floating = schedule.levels(whole), levels_at(schedule, whole.float())
    assert torch.equal(table.alpha, floating.alpha) and torch.equal(table.sigma, floating.sigma)
    assert floating.alpha[-1] == 0


@pytest.mark.parametrize("name", NOISES)
def test_differences_of_predictions_convert_at_x_t_zero(name: PredictionType) -> None:
    one, two, x_t = torch.randn(3, 2, *SHAPE, dtype=torch.float64)
    levels = noise_level(name, 400)
    nothing = torch.zeros_like(x_t)
    change = to_x0(name, one, x_t, levels) - to_x0(name, two, x_t, levels)
    torch.testing.assert_close(to_x0(name, one - two, nothing, levels), change)
    torch.testing.assert_close(convert("sample", name, change, nothing, levels), one - two)


# --- scales by name ------------------------------------------------------------------------------------------------


@given(scale=st.floats(0, 30), chosen=st.sets(st.sampled_from(CONDITIONS)))
def test_one_number_is_for_every_condition_but_inpainting(scale: float, chosen: set[str]) -> None:
    scales = resolve_scales(scale, chosen)
    assert list(scales) == [name for name in CONDITIONS if name in chosen]
    assert all(value == (1 if name == "inpainting" else scale) for name, value in scales.items())


def test_a_mapping_names_scales_and_the_others_are_one() -> None:
    everything = ["text", "label", "semantic", "inpainting"]
    assert resolve_scales({"text": 7, "inpainting": 2}, everything) == {
        "inpainting": 2.0,
        "semantic": 1.0,
        "label": 1.0,
        "text": 7.0,
    }
    assert list(resolve_scales({}, everything)) == list(CONDITIONS)


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        (
            {"txet": 7.0},
            "guidance_scale: found 'txet'; allowed is inpainting, semantic, label, text; did you mean text?",
        ),
        ({"semantics": 7.0}, "; did you mean semantic?"),
        ({"label": 2.0}, "guidance_scale: found label, a condition that is not given; allowed is semantic, text"),
        ({"text": -1.0}, "guidance_scale text: found -1.0; allowed is 0 or more; 1 turns guidance off"),
        ({"text": "7"}, "guidance_scale text: found 7; allowed is 0 or more"),
        (-1, "guidance_scale: found -1; allowed is 0 or more; 1 turns guidance off"),
    ],
)
def test_scales_that_cannot_be_used_are_refused(scale: Any, message: str) -> None:
    with pytest.raises(UserError) as error:
        resolve_scales(scale, ["text", "semantic"])
    assert message in str(error.value) and "\n" not in str(error.value)


def test_unknown_conditions_are_the_callers_mistake() -> None:
    with pytest.raises(ValueError, match="given: found depth"):
        resolve_scales(3.0, ["depth"])


@pytest.mark.parametrize("scale", [-0.1, float("nan"), float("inf"), None, "7"])
def test_an_impossible_scale_is_refused(scale: Any) -> None:
    with pytest.raises(UserError, match=r"guidance_scale: found .* 1 turns guidance off"):
        check_guidance_scale(scale)
    with pytest.raises(UserError, match=r"guidance_scale: found .* 1 turns guidance off"):
        Guidance(Chain(1), [Conditions()], [scale])
    with pytest.raises(UserError, match=r"guidance_scale text: found"):
        check_guidance_scale({"text": scale})


@pytest.mark.parametrize(
    ("text", "scale"),
    [
        ("7", 7.0),
        (" 2.5 ", 2.5),
        ("0", 0.0),
        ("text=7", {"text": 7.0}),
        ("text=7,semantic=2", {"text": 7.0, "semantic": 2.0}),
        ("text=7 semantic=2", {"text": 7.0, "semantic": 2.0}),
        (" text = 7 ,  semantic= 1.5, ", {"text": 7.0, "semantic": 1.5}),
    ],
)
def test_the_command_lines_scale(text: str, scale: float | dict[str, float]) -> None:
    assert parse_guidance_scale(text) == scale


@given(scales=st.dictionaries(st.sampled_from(CONDITIONS), st.floats(0, 1e6), min_size=1), comma=st.booleans())
def test_written_scales_are_read_back(scales: dict[str, float], comma: bool) -> None:
    words = [f"{name}={scale!r}" for name, scale in scales.items()]
    assert parse_guidance_scale(("," if comma else " ").join(words)) == scales


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "guidance_scale: found nothing; allowed is one number, or NAME=NUMBER"),
        (",", "guidance_scale: found nothing"),
        ("much", "guidance_scale: found 'much'; allowed is one number, or NAME=NUMBER"),
        ("7,8", "guidance_scale: found '7' in '7,8'; allowed is one number, or NAME=NUMBER"),
        ("7,text=2", "guidance_scale: found '7' in '7,text=2'"),
        ("text=", "guidance_scale: found ''; allowed is one number"),
        ("=7", "guidance_scale: found ''; allowed is inpainting, semantic, label, text"),
        ("text=7=8", "guidance_scale: found '7=8'; allowed is one number"),
        ("text=7,text=8", "guidance_scale: found text twice"),
        ("prompt=7,test=3", "guidance_scale: found 'prompt'; allowed is inpainting, semantic, label, text"),
        ("semantc=3", "did you mean semantic?"),
        ("text=nan", "guidance_scale text: found nan; allowed is 0 or more"),
        ("-2", "guidance_scale: found -2.0; allowed is 0 or more; 1 turns guidance off"),
    ],
)
def test_a_command_line_that_cannot_be_read_is_refused(text: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        parse_guidance_scale(text)
    assert message in str(error.value) and "\n" not in str(error.value)


# --- options and imports -------------------------------------------------------------------------------------------

NAN = float("nan")


@pytest.mark.parametrize(
    ("options", "values", "field"),
    [
        (GuidanceOptions, {"interval": (0.7, 0.3)}, "interval"),
        (GuidanceOptions, {"interval": (-0.1, 0.3)}, "interval"),
        (GuidanceOptions, {"interval": (0.1, 1.1)}, "interval"),
        (GuidanceOptions, {"interval": (NAN, 1.0)}, "interval"),
        (GuidanceOptions, {"interval": (0.0, NAN)}, "interval"),
        (GuidanceOptions, {"interval": (0.5,)}, "interval"),
        (GuidanceOptions, {"rescale": -0.1}, "rescale"),
        (GuidanceOptions, {"rescale": 1.1}, "rescale"),
        (GuidanceOptions, {"rescale": NAN}, "rescale"),
        (ApgOptions, {"eta": -0.1}, "eta"),
        (ApgOptions, {"eta": NAN}, "eta"),
        (ApgOptions, {"norm_threshold": 0.0}, "norm_threshold"),
        (ApgOptions, {"norm_threshold": NAN}, "norm_threshold"),
        (ApgOptions, {"momentum": 1.0}, "momentum"),
        (ApgOptions, {"momentum": -1.0}, "momentum"),
        (ApgOptions, {"momentum": NAN}, "momentum"),
    ],
)
def test_impossible_options_are_refused_by_the_fields_name(options: Any, values: dict[str, Any], field: str) -> None:
    with pytest.raises(ValueError, match=f"^{field}: found .*; allowed is .*; ") as error:
        options(**values)
    assert "\n" not in str(error.value)


def test_scales_and_conditions_must_match() -> None:
    with pytest.raises(ValueError, match="found 1 conditions and 2 scales"):
        Guidance(Chain(1), [Conditions()], [1.0, 2.0])


@pytest.mark.parametrize("options", [GuidanceOptions(interval=(0.0, 0.9)), GuidanceOptions(apg=ApgOptions())])
def test_an_interval_and_apg_need_the_noise_schedule(options: GuidanceOptions) -> None:
    with pytest.raises(ValueError, match="noise_schedule: found None"):
        Guidance(Chain(1), [Conditions()], [2.0], options)


def test_what_is_needed_can_be_asked_before_anything_is_encoded() -> None:
    assert needed_predictions([1.0, 7.0], GuidanceOptions()) == (1, 2)
    assert needed_predictions([7.0, 0.0], GuidanceOptions()) == (0, 1)
    assert needed_predictions([7.0, 0.0], GuidanceOptions(rescale=0.1)) == (0, 1, 2)
    assert needed_predictions([], GuidanceOptions()) == (0,)


def test_guidance_loads_neither_diffusers_nor_the_sampler() -> None:
    code = "import sys, ldm.guidance; print({'diffusers', 'ldm.sampling', 'ldm.pipeline'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"

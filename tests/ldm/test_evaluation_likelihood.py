"""Bits per dimension: exact for Gaussian data, the terms sum to the total, any prediction gives the same."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from autoencoder.latents import Moments
from ldm.data.sample import Batch
from ldm.errors import UserError
from ldm.evaluation.autoencoder_share import SCALES, ShareMeter, discretised_laplace, entropy
from ldm.evaluation.likelihood import LatentBatch, measure_errors, stratum_edges, variational_bound
from ldm.evaluation.model_likelihood import measure_likelihood
from ldm.noise import NoiseConfig, NoiseSchedule, training_target
from ldm.pipeline import LatentDiffusionPipeline

STD = 0.7
"""Of the Gaussian data."""
SHAPE = (2, 4, 4)


def schedule_of(**values: object) -> NoiseSchedule:
    return NoiseSchedule.from_config(NoiseConfig(**values))  # type: ignore[arg-type]


def best_prediction(schedule: NoiseSchedule, std: float = STD) -> Callable[[Tensor, Tensor], Tensor]:
    """What the best network says of x_t for data N(0, std^2): E[x_0 | x_t] is linear in x_t."""

    def predict(noisy: Tensor, timesteps: Tensor) -> Tensor:
        levels = schedule.levels(timesteps)
        alpha, sigma = levels.alpha.double(), levels.sigma.double()
        x_0 = alpha * std**2 / (alpha**2 * std**2 + sigma**2) * noisy.double()
        noise = (noisy.double() - alpha * x_0) / sigma
        return training_target(schedule.config.prediction, x_0, noise, levels)

    return predict


def gaussian(count: int, seed: int = 0) -> Tensor:
    """Normal draws of exactly this deviation, so that the data's own scatter is in no figure."""
    draws = torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(seed)).double()
    return draws * STD / draws.square().mean().sqrt()


def batches(schedule: NoiseSchedule, latents: Tensor, size: int = 64) -> Iterator[LatentBatch]:
    predict = best_prediction(schedule)
    return (LatentBatch(part, predict) for part in latents.split(size))


ENTROPY = 0.5 * math.log2(2 * math.pi * math.e * STD**2)
"""Bits per dimension: no model of this data can need less."""


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_the_best_denoiser_of_gaussian_data_reaches_its_entropy(name: str, prediction: str) -> None:
    """With the best variances every reverse step is the true one, so the bound is the entropy itself."""
    schedule = schedule_of(schedule=name, prediction=prediction, timesteps=20, beta_start=0.001, beta_end=0.4)
    errors = measure_errors(batches(schedule, gaussian(300), 300), schedule, strata=1000)
    assert errors.squares.shape == (300, 19)
    a = errors.alphas_cumprod
    last = a[-1].item()
    gap = 0.5 * (last * (STD**2 - 1) - math.log(1 + last * (STD**2 - 1))) / math.log(2)  # x_T is not quite N(0, 1)
    total = variational_bound(errors, "fitted").total
    assert total.high is not None and total.high - total.value < 0.05
    assert total.value == pytest.approx(ENTROPY + gap, abs=1.5 * (total.high - total.value))  # noise was drawn
    mean = STD**2 * (1 - a) / (a * STD**2 + 1 - a)
    exact = replace(errors, squares=mean[1:].expand(300, -1), first=mean[:1].expand(300))
    assert variational_bound(exact, "fitted").total.value == pytest.approx(ENTROPY + gap, abs=1e-9)
    for other in ("small", "large"):
        assert variational_bound(exact, other).total.value > ENTROPY + gap  # type: ignore[arg-type]


@pytest.mark.parametrize("variance", ["small", "large"])
def test_every_term_is_its_closed_form(variance: str) -> None:
    """DDPM's terms for Gaussian data: |x_0 - E[x_0 | x_t]|^2 has the mean std^2 sigma^2 / (alpha^2 std^2 + sigma^2)."""
    schedule = schedule_of(schedule="linear", timesteps=10, beta_start=0.01, beta_end=0.5, prediction="epsilon")
    errors = measure_errors(batches(schedule, gaussian(2000), 2000), schedule, strata=1000)
    bound = variational_bound(errors, variance)  # type: ignore[arg-type]
    a = errors.alphas_cumprod
    error = STD**2 * (1 - a) / (a * STD**2 + 1 - a)
    for term in bound.terms:
        t = term.first
        beta = 1 - a[t] / a[t - 1]
        posterior = beta * (1 - a[t - 1]) / (1 - a[t])
        gain = a[t - 1] * beta**2 / (1 - a[t]) ** 2
        chosen = posterior if variance == "small" else beta
        expected = 0.5 * (torch.log(chosen / posterior) + (posterior + gain * error[t]) / chosen - 1) / math.log(2)
        assert term.last == t
        assert term.bits == pytest.approx(expected.item(), rel=0.02)
        assert abs(term.bits - expected.item()) < 5 * term.error
    first = 1 - a[0] if variance == "large" else (1 - a[1] / a[0]) * (1 - a[0]) / (1 - a[1])
    expected = 0.5 * (torch.log(2 * math.pi * first) + error[0] / first) / math.log(2)
    assert bound.decoder == pytest.approx(expected.item(), abs=0.02)
    assert bound.total.value > ENTROPY


def test_small_variances_are_the_signal_to_noise_ratios_formula() -> None:
    """VDM (arXiv 2107.00630, eq. 14): L_t = (snr(t - 1) - snr(t)) |x_0 - x_0(x_t)|^2 / 2."""
    schedule = schedule_of(schedule="scaled_linear", timesteps=50, prediction="v_prediction")
    errors = measure_errors(batches(schedule, gaussian(20)), schedule, strata=1000)
    a = errors.alphas_cumprod
    snr = a / (1 - a)
    expected = 0.5 * (snr[:-1] - snr[1:]) * errors.squares.mean(0) / math.log(2)
    found = torch.tensor([term.bits for term in variational_bound(errors, "small").terms], dtype=torch.float64)
    assert torch.allclose(found, expected, rtol=1e-9)


@pytest.mark.parametrize("variance", ["small", "large", "fitted"])
@pytest.mark.parametrize("strata", [1, 7, 1000])
def test_the_terms_sum_to_the_total(variance: str, strata: int) -> None:
    schedule = schedule_of(timesteps=60)
    bound = variational_bound(measure_errors(batches(schedule, gaussian(30)), schedule, strata=strata), variance)  # type: ignore[arg-type]
    parts = bound.prior + sum(term.total for term in bound.terms) + bound.decoder
    assert bound.total.value == pytest.approx(parts, rel=1e-12)
    assert [term.first for term in bound.terms] == [1, *(term.last + 1 for term in bound.terms[:-1])]
    assert bound.terms[-1].last == 59
    assert bound.total.low is not None and bound.total.low < bound.total.value


def test_a_few_strata_agree_with_every_timestep_within_the_interval() -> None:
    schedule = schedule_of(timesteps=100)
    whole = variational_bound(measure_errors(batches(schedule, gaussian(100)), schedule, strata=1000))
    few = variational_bound(measure_errors(batches(schedule, gaussian(100)), schedule, strata=12, seed=3))
    assert few.total.low is not None and few.total.high is not None
    reach = few.total.high - few.total.value
    assert abs(few.total.value - whole.total.value) < 2 * reach
    assert reach < 0.3


def test_the_result_does_not_depend_on_batches() -> None:
    schedule = schedule_of(timesteps=60)
    whole = measure_errors(batches(schedule, gaussian(10), 10), schedule, strata=5)
    parts = measure_errors(batches(schedule, gaussian(10), 3), schedule, strata=5)
    assert torch.equal(whole.timesteps, parts.timesteps)
    assert torch.allclose(whole.squares, parts.squares, rtol=1e-9)


def test_zero_terminal_snr_has_no_prior_term() -> None:
    schedule = schedule_of(timesteps=30, zero_terminal_snr=True)
    bound = variational_bound(measure_errors(batches(schedule, gaussian(20)), schedule, strata=1000))
    assert bound.prior == 0
    assert math.isfinite(bound.total.value)


@pytest.mark.parametrize("timesteps", [2, 3, 10, 1000])
@pytest.mark.parametrize("strata", [1, 2, 16, 5000])
def test_strata_cover_every_timestep_once(timesteps: int, strata: int) -> None:
    edges = stratum_edges(timesteps, strata)
    assert (edges[0], edges[-1]) == (1, timesteps)
    assert list(edges) == sorted(set(edges))
    assert len(edges) - 1 <= max(strata, 1)


def test_no_latents_and_flow_matching_are_refused() -> None:
    with pytest.raises(UserError, match="found 0 images"):
        measure_errors([], schedule_of())
    with pytest.raises(UserError, match="flow matching"):
        measure_errors([], schedule_of(schedule="flow", prediction="flow"))


def test_one_latent_has_a_value_and_no_interval() -> None:
    schedule = schedule_of(timesteps=10)
    total = variational_bound(measure_errors(batches(schedule, gaussian(1)), schedule, strata=3)).total
    assert math.isfinite(total.value) and total.low is None


# --- The autoencoder's share -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [0.3, 4.0, 60.0])
@pytest.mark.parametrize("mean", [-3.0, 0.0, 100.25, 254.9])
def test_the_discretised_laplace_is_a_distribution(scale: float, mean: float) -> None:
    values = torch.arange(256, dtype=torch.float64)
    nats = discretised_laplace(values, torch.full_like(values, mean), scale)
    assert (-nats).exp().sum().item() == pytest.approx(1)
    if scale == 60.0 and mean == 100.25:
        inside = values[1:-1]
        laplace = torch.distributions.Laplace(mean, scale)
        expected = -(laplace.cdf(inside + 0.5) - laplace.cdf(inside - 0.5)).log()
        assert torch.allclose(nats[1:-1], expected)
    assert nats.isfinite().all()  # 250 steps away at a scale of 0.3, too


def test_the_posteriors_entropy_is_that_of_gaussians() -> None:
    logvar = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0))
    normal = torch.distributions.Normal(torch.zeros_like(logvar), (0.5 * logvar).exp())
    assert torch.allclose(entropy(Moments(logvar * 0, logvar)), normal.entropy().flatten(1).sum(1).double(), rtol=1e-5)


def test_the_share_adds_up_and_picks_the_best_scale(tiny_pipeline: LatentDiffusionPipeline) -> None:
    vae = tiny_pipeline.vae
    generator = torch.Generator().manual_seed(0)
    reconstructions = (torch.rand(3, 3, 32, 32, generator=generator) - 0.5).double()
    spread = torch.distributions.Laplace(0.0, 8 * 2 / 255)
    torch.manual_seed(0)
    images = reconstructions + spread.sample(reconstructions.shape)
    moments = Moments(torch.zeros(3, 4, 16, 16), torch.full((3, 4, 16, 16), -4.0))
    meter = ShareMeter()
    meter.update(vae, moments, images, reconstructions)
    schedule = schedule_of(timesteps=10)
    bound = variational_bound(measure_errors(batches(schedule, gaussian(4)), schedule, strata=3))
    share = meter.result(bound)
    assert share.scale == 8.0 and share.scale in SCALES
    assert share.distortion == pytest.approx(math.log2(2 * math.e * 8), rel=0.02)  # a Laplace's entropy
    latents = 4 * 16 * 16
    cost = bound.total.value * latents - entropy(moments)[0].item() / math.log(2)
    assert share.rate == pytest.approx(cost / (3 * 32 * 32), rel=1e-9)
    assert share.total == share.rate + share.distortion


def test_the_likelihood_of_a_model(
    tiny_pipeline: LatentDiffusionPipeline, conditioned_pipeline: LatentDiffusionPipeline
) -> None:
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    batch = Batch(("a", "b", "c"), (0, 1, 2), ("a red circle", "a blue square", ""), images)
    found = measure_likelihood(tiny_pipeline, [batch], strata=3)
    assert {bound.variance for bound in found.bounds} == {"small", "large", "fitted"}
    assert [bound.total.value for bound in found.bounds] == sorted(bound.total.value for bound in found.bounds)
    assert found.share is not None and math.isfinite(found.share.total)
    other = replace(batch, captions=("a red circle", "a blue square", "another"))
    assert measure_likelihood(tiny_pipeline, [other], strata=3).bounds[0] != found.bounds[0]  # captions count
    full = replace(batch, semantic=torch.zeros(3, 32, 32, dtype=torch.int64), labels=torch.tensor([0, 1, -1]))
    unknown = replace(batch, labels=torch.tensor([-1, -1, -1]))
    told, untold = (measure_likelihood(conditioned_pipeline, [each], strata=3) for each in (full, unknown))
    assert told.bounds[0] != untold.bounds[0]
    assert "bits per pixel" in told.lines()[1]


def test_a_vq_model_has_bits_of_latents_alone(make_pipeline: Callable[..., LatentDiffusionPipeline]) -> None:
    pipeline = make_pipeline(NoiseConfig(), kind="vq")
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    found = measure_likelihood(pipeline, [Batch(("a", "b"), (0, 1), ("x", "y"), images)], strata=2)
    assert found.share is None
    assert "VQ" in found.lines()[1]

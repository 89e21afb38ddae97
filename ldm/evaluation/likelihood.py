"""The variational bound on -log p of latents in bits per dimension, term by term (DDPM, arXiv 2006.11239, eq. 5).

    L = L_T + sum over t of L_{t-1} + L_0
    L_T     = KL(q(x_T | x_0) || N(0, 1))
    L_{t-1} = KL(q(x_{t-1} | x_t, x_0) || N(mu(x_t, t), v_t))
    L_0     = -log N(x_0; mu(x_1, 1), v_1), a density, since latents are continuous; it may be negative

Every term but L_T depends on the network through |x_0 - x_0(x_t, t)|^2 alone, whatever it predicts (`to_x0`), so these
errors are measured once and the bound follows for every choice of the variances v_t. The paper's t = 1..T are the
schedule's 0..T-1. Expectations over t are taken by strata: each image visits one timestep in each, so every image's
bound is unbiased, and its scatter over images gives the standard error.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ldm.errors import UserError
from ldm.evaluation.bootstrap import NORMAL_QUANTILE
from ldm.evaluation.measurement import Estimate, check_count
from ldm.noise import NoiseSchedule, add_noise, to_x0
from ldm.randomness import normal_for_each, uniform_for_each

Variance = Literal["small", "large", "fitted"]
"""v_t of the model's steps. small: the posterior's (1 - a_{t-1}) / (1 - a_t) beta_t. large: beta_t (both DDPM, 3.2).
fitted: the best one for all latents (Analytic-DPM, arXiv 2201.06503), one number a stratum, taken from the measured
latents themselves; where a stratum's timesteps want different ones, `large` may be tighter."""
STRATA = 16


@dataclass(frozen=True)
class LatentBatch:
    """Latents to be told the bound of, and the network with their conditions."""

    latents: Tensor
    """[B, C, h, w], as the U-Net sees them: samples of the posterior."""
    predict: Callable[[Tensor, Tensor], Tensor]
    """(x_t [B, C, h, w], timesteps [B]) -> the network's output, of the schedule's prediction type."""


@dataclass(frozen=True)
class BoundTerm:
    """The terms of timesteps `first`..`last`: mean of one of them in bits per dimension, and its standard error."""

    first: int
    last: int
    bits: float
    error: float

    @property
    def total(self) -> float:
        """Their sum."""
        return self.bits * (self.last - self.first + 1)


@dataclass(frozen=True)
class VariationalBound:
    """Bits per latent dimension. `total` is the sum of `prior`, the `terms`' totals and `decoder`."""

    n: int
    dimensions: int
    variance: Variance
    total: Estimate
    prior: float
    """L_T: what is still to be seen of the data in x_T; above about 0.01 the schedule ends too early."""
    terms: tuple[BoundTerm, ...]
    """L_1 .. L_{T-1}, by strata of timesteps."""
    decoder: float
    """L_0, a log-density: negative where latents are told more finely than to 1."""

    def line(self) -> str:
        """`1.95 bits per latent dimension = L_T 0.0001 + L_t 5.2 + L_0 -3.2`."""
        steps = sum(term.total for term in self.terms)
        interval = "" if self.total.low is None else f" [{self.total.low:.4g}, {self.total.high:.4g}]"
        return (
            f"{self.total.value:.4g}{interval} bits per latent dimension = L_T {self.prior:.3g} + L_t {steps:.4g} + "
            f"L_0 {self.decoder:.4g}; n = {self.n}, {self.dimensions} dimensions, variance {self.variance}"
        )


@dataclass(frozen=True)
class BoundErrors:
    """What the bound is computed from: mean squared errors of x_0 per dimension, float64 on the CPU."""

    alphas_cumprod: Tensor
    """[T]."""
    edges: tuple[int, ...]
    """Stratum s holds the timesteps edges[s] .. edges[s + 1] - 1; the first edge is 1, the last T."""
    timesteps: Tensor
    """int64 [N, S]: the one visited in each stratum."""
    squares: Tensor
    """[N, S]."""
    first: Tensor
    """[N], at timestep 0."""
    power: Tensor
    """[N]: mean of x_0^2."""
    dimensions: int


@torch.no_grad()
def measure_errors(
    batches: Iterable[LatentBatch], schedule: NoiseSchedule, *, seed: int = 0, strata: int = STRATA
) -> BoundErrors:
    """Ask the network once in every stratum and once at timestep 0 for each latent.

    With `strata` = T - 1 every timestep is visited. What is drawn depends on (seed, stratum, number of the latent)
    alone. Raises `UserError` for no latents, and for flow matching, whose bound these formulas are not.
    """
    table = schedule.alphas_cumprod
    if table is None:
        raise UserError("bits per dimension: found flow matching; allowed are diffusion schedules, whose bound it is")
    edges = stratum_edges(len(table), strata)
    timesteps: list[Tensor] = []
    squares: list[Tensor] = []
    first: list[Tensor] = []
    power: list[Tensor] = []
    count, dimensions = 0, 0
    for batch in batches:
        numbers = range(count, count + len(batch.latents))
        count, dimensions = numbers.stop, batch.latents[0].numel()
        visited = [_draw_timesteps(numbers, edges, s, seed) for s in range(len(edges) - 1)]
        errors = [_squared_error(batch, t, schedule, numbers, seed, s) for s, t in enumerate(visited)]
        start = torch.zeros(len(batch.latents), dtype=torch.int64)
        timesteps.append(torch.stack(visited, dim=1))
        squares.append(torch.stack(errors, dim=1))
        first.append(_squared_error(batch, start, schedule, numbers, seed, "first"))
        power.append(batch.latents.double().square().flatten(1).mean(1).cpu())
    check_count("data", count, 1, "bits per dimension")
    table = table.double().cpu()
    visits = torch.cat(timesteps), torch.cat(squares)
    return BoundErrors(table, edges, *visits, torch.cat(first), torch.cat(power), dimensions)


def variational_bound(errors: BoundErrors, variance: Variance = "small") -> VariationalBound:
    """The bound from measured errors. Per dimension, with a = alphas_cumprod, c = sqrt(a_{t-1}) beta_t / (1 - a_t):

    L_{t-1} = (log(v / s) + (s + c^2 |x_0 - x_0(x_t)|^2) / v - 1) / 2, s the posterior's variance. The interval is
    the mean's over latents, 1.96 standard errors.
    """
    widths = torch.tensor(errors.edges).diff().double()  # [S]
    posterior, betas, gain = _step_constants(errors.alphas_cumprod, errors.timesteps)  # each [N, S]
    excess = gain * errors.squares / posterior  # [N, S]: c^2 |x_0 - x_0(x_t)|^2 / s
    ratio = {"small": torch.ones_like(betas), "large": betas / posterior, "fitted": 1 + excess.mean(0, keepdim=True)}
    steps = 0.5 * (ratio[variance].log() + (1 + excess) / ratio[variance] - 1)  # [N, S]
    last = errors.alphas_cumprod[-1]
    prior = 0.5 * ((1 - last) + last * errors.power - 1 - torch.log(1 - last))  # [N]
    decoder = _decoder_term(errors, variance)  # [N]
    bits = (prior + steps @ widths + decoder) / math.log(2)  # [N]
    terms = [
        BoundTerm(low, high - 1, values.mean().item(), _standard_error(values))
        for low, high, values in zip(errors.edges[:-1], errors.edges[1:], steps.T / math.log(2), strict=True)
    ]
    value, reach = bits.mean().item(), NORMAL_QUANTILE * _standard_error(bits)
    total = Estimate(value) if math.isnan(reach) else Estimate(value, value - reach, value + reach)
    return VariationalBound(
        n=len(bits),
        dimensions=errors.dimensions,
        variance=variance,
        total=total,
        prior=prior.mean().item() / math.log(2),
        terms=tuple(terms),
        decoder=decoder.mean().item() / math.log(2),
    )


def stratum_edges(timesteps: int, strata: int) -> tuple[int, ...]:
    """At most `strata` runs of the timesteps 1..T-1, short at the clean end, where the terms are large and differ."""
    if strata >= timesteps - 1:
        return tuple(range(1, timesteps + 1))
    spread = [1 + round((timesteps - 1) * (i / strata) ** 2) for i in range(strata + 1)]
    return tuple(sorted(set(spread)))


def _draw_timesteps(numbers: Sequence[int], edges: Sequence[int], stratum: int, seed: int) -> Tensor:
    uniforms = uniform_for_each(numbers, seed, "bound timestep", stratum).double()  # [B]
    low, high = edges[stratum], edges[stratum + 1]
    return (low + (uniforms * (high - low)).long()).clamp(max=high - 1)


def _squared_error(
    batch: LatentBatch,
    timesteps: Tensor,
    schedule: NoiseSchedule,
    numbers: Sequence[int],
    seed: int,
    stratum: int | str,
) -> Tensor:
    """Mean over C, h, w of |x_0 - x_0(x_t, t)|^2 for one draw of the noise, [B] float64."""
    latents = batch.latents
    noise = normal_for_each(numbers, latents.shape[1:], seed, "bound noise", stratum).to(latents)
    timesteps = timesteps.to(latents.device)
    levels = schedule.to(latents.device).levels(timesteps)
    noisy = add_noise(latents, noise, levels)  # [B, C, h, w]
    x_0 = to_x0(schedule.config.prediction, batch.predict(noisy, timesteps), noisy, levels)
    return (x_0.double() - latents.double()).square().flatten(1).mean(1).cpu()


def _step_constants(table: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Posterior variance, beta and c^2 at `timesteps` (1..T-1) (DDPM, eq. 6 and 7)."""
    now, before = table[timesteps], table[timesteps - 1]
    betas = 1 - now / before
    return betas * (1 - before) / (1 - now), betas, before * (betas / (1 - now)).square()


def _decoder_term(errors: BoundErrors, variance: Variance) -> Tensor:
    """L_0 in nats per dimension, [N]. Its v is beta_0, for `small` the next step's posterior variance (IDDPM, 3.1)."""
    first = torch.ones(1, dtype=torch.int64)
    choice = {
        "small": _step_constants(errors.alphas_cumprod, first)[0],
        "large": 1 - errors.alphas_cumprod[:1],
        "fitted": errors.first.mean(0, keepdim=True),
    }[variance]
    return 0.5 * ((2 * math.pi * choice).log() + errors.first / choice)


def _standard_error(values: Tensor) -> float:
    """NaN for one value."""
    return (values.std() / math.sqrt(len(values))).item() if len(values) > 1 else math.nan

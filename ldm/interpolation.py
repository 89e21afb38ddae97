"""Between two images: the noise that an image comes from, and the way from one to another."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from conditioning.conditions import Conditions
from ldm.errors import UserError
from ldm.guidance import Denoiser
from ldm.noise import NoiseLevels, NoiseSchedule, PredictionType, add_noise, to_noise, to_x0

NEARLY_PARALLEL = 1e-4
"""Radians. Below it the arc and the chord differ by less than float32 can tell (angle^2 / 8)."""
LEAST_SIGNAL = 0.01
"""Smallest alpha that the first step away from x_0 may reach: beyond it x_0 is lost in rounding."""


def fractions(frames: int) -> tuple[float, ...]:
    """`frames` evenly spaced numbers from 0 to 1, both included. Raises UserError below 2 frames."""
    if frames < 2:
        raise UserError(f"frames: found {frames}; allowed is 2 or more, the two ends included; 8 makes a good strip")
    return tuple(frame / (frames - 1) for frame in range(frames))


def lerp(a: Tensor, b: Tensor, t: float) -> Tensor:
    """(1 - t) a + t b, of the same shape: for contexts and class embeddings. Exact at both ends.

    Raises UserError when the shapes differ or t lies outside [0, 1].
    """
    _check_pair(a, b, t)
    return torch.lerp(a, b, t)


def slerp(a: Tensor, b: Tensor, t: float) -> Tensor:
    """The point at share t of the arc from a to b, latents [C, h, w] or [B, C, h, w], each sample on its own arc.

        sin((1 - t) angle) / sin(angle) a + sin(t angle) / sin(angle) b      (arXiv 2010.02502, eq. 67)

    `angle` lies between the flattened samples. Noise of many dimensions lies near a sphere; the straight line between
    two draws leaves it (norm 0.71 half way) and the denoiser then paints blur. Equal norms are kept along the way.
    Exact at both ends; nearly parallel samples (or one that is 0) are joined by the straight line.

    Raises UserError when shapes differ, t lies outside [0, 1], or the samples are opposite: every arc is then shortest.
    """
    _check_pair(a, b, t)
    if a.ndim not in (3, 4):
        raise UserError(f"latents: found shape {tuple(a.shape)}; allowed is [C, h, w] or [B, C, h, w]; reshape them")
    angle = _angles(a.double().flatten(-3), b.double().flatten(-3))[..., None, None, None]
    if (angle > torch.pi - NEARLY_PARALLEL).any():
        raise UserError("latents: found two that are exact opposites, with no shortest way between; take another seed")
    straight = angle < NEARLY_PARALLEL
    angle = angle.masked_fill(straight, 1.0)  # any number whose sine is not 0
    weight_a = torch.where(straight, 1 - t, ((1 - t) * angle).sin() / angle.sin())
    weight_b = torch.where(straight, t, (t * angle).sin() / angle.sin())
    return (weight_a * a + weight_b * b).to(a.dtype)  # weights in float64: the ends come out exact


def _angles(a: Tensor, b: Tensor) -> Tensor:
    """Angles between the last dimensions, exact near 0 and pi too, where the arc cosine is not; 0 beside a zero.

    Kahan, "How futile are mindless assessments of roundoff", section 12.
    """
    norm_a, norm_b = a.norm(dim=-1, keepdim=True), b.norm(dim=-1, keepdim=True)
    a, b = a * norm_b, b * norm_a
    return 2 * torch.atan2((a - b).norm(dim=-1), (a + b).norm(dim=-1))


def _check_pair(a: Tensor, b: Tensor, t: float) -> None:
    if a.shape != b.shape:
        raise UserError(
            f"interpolation: found shapes {tuple(a.shape)} and {tuple(b.shape)}; allowed is the same shape twice; "
            "bring both to one size"
        )
    if not 0 <= t <= 1:
        raise UserError(f"interpolation: found a share of {t}; allowed is 0 (the first) to 1 (the second)")


class _Told(NamedTuple):
    """What the network says x_t is made of."""

    x_0: Tensor  # [B, C, h, w]
    noise: Tensor  # [B, C, h, w]

    def at(self, levels: NoiseLevels) -> Tensor:
        return add_noise(self.x_0, self.noise, levels)


@torch.no_grad()
def denoise_deterministic(
    denoiser: Denoiser,
    noise_schedule: NoiseSchedule,
    prediction: PredictionType,
    latents: Tensor,
    conditions: Conditions,
    timesteps: Tensor,
) -> Tensor:
    """From noise to x_0, float32 [B, C, h, w], by DDIM with eta = 0 (arXiv 2010.02502, eq. 12; Euler's rule for flow).

    `latents` [B, C, h, w] are at the noise level of timesteps[0], x_t = alpha x_0 + sigma noise; `timesteps` [N] go
    down, one a step, as in a diffusers scheduler (whole for diffusion, real in (0, T] for flow). The last step goes to
    x_0 itself. `prediction` is what `denoiser` returns. Raises UserError for impossible timesteps.
    """
    levels = _levels(noise_schedule, prediction, timesteps, latents)
    latents = latents.float()
    for t, here, there in zip(timesteps.to(latents.device), levels, [*levels[1:], _clean(latents)], strict=True):
        latents = _ask(denoiser, prediction, latents, t, here, conditions).at(there)
    return latents


@torch.no_grad()
def invert(
    denoiser: Denoiser,
    noise_schedule: NoiseSchedule,
    prediction: PredictionType,
    latents: Tensor,
    conditions: Conditions,
    timesteps: Tensor,
    refinements: int = 2,
) -> Tensor:
    """The noise latents, float32 at the level of timesteps[0], from which `denoise_deterministic` makes x_0 `latents`.

    The DDIM ODE run backwards (arXiv 2010.02502, section 4.3), through the same `timesteps` [N], given in the same
    order, with the same denoiser and conditions. Each step solves, for the noisier x_u above the known x_l,

        x_l = step(x_u),   step(x) = alpha_l x_0(x, u) + sigma_l noise(x, u)

    beginning with the paper's explicit step (what was told at the level below, carried on) and then iterating
    x_u += (x_l - step(x_u)) / slope, where slope = (alpha_l alpha_u + sigma_l sigma_u) / (alpha_u^2 + sigma_u^2) is
    the derivative of `step` for data of unit variance, which latents are scaled to. That is one iteration and
    `refinements` more, one evaluation each: N (1 + refinements) in all. Strong guidance, or very few steps, may keep
    the iteration from settling: invert with guidance scale 1. A network of epsilon on the cosine schedule cannot begin
    at timestep 999, where its errors are multiplied by 20,000 (1 / alpha).

    With the trained demo network (cosine v, zero terminal SNR) two of its own images came back, over the same
    timesteps, to these root mean squares (measured, for 0, 1, 2 refinements): 10 steps 0.086, 0.030, 0.017; 20 steps
    0.046, 0.008, 0.004; 50 steps 0.021, 0.0011, 0.0003. More refinements make the round trip exact for those very
    steps, not the noise more normal: with few steps it drifts away from the exact ODE's (Gaussian data, measured). For
    noise to be mixed by `slerp` take 50 steps or more.

    Pure noise (alpha = 0: zero terminal SNR, flow) may be timesteps[0]: there `step` keeps sigma_l of x_u, from which
    it is found again. It cannot be the only timestep: x_0 alone does not tell which noise a single step removed.

    Raises UserError for impossible timesteps, a negative number of refinements, and when nothing finite is found.
    """
    levels = _levels(noise_schedule, prediction, timesteps, latents)
    _check_inversion(refinements, float(levels[-1].alpha), timesteps)
    latents = latents.float()
    below, told = _clean(latents), None
    for t, here in zip(timesteps.to(latents.device).flip(0), reversed(levels), strict=True):
        known = latents
        latents = known if told is None else told.at(here)
        slope = below.alpha * here.alpha + below.sigma * here.sigma
        slope = slope / (here.alpha.square() + here.sigma.square())  # [1, 1, 1, 1]
        for _ in range(1 + refinements):
            told = _ask(denoiser, prediction, latents, t, here, conditions)
            latents = latents + (known - told.at(below)) / slope  # [B, C, h, w]
        below = here
    if not latents.isfinite().all():
        raise UserError(
            f"inversion: found no finite noise, the {refinements} refinements did not settle; allowed is a denoiser "
            "that varies smoothly; use guidance scale 1, more steps or fewer refinements"
        )
    return latents


def _ask(
    denoiser: Denoiser, prediction: PredictionType, latents: Tensor, t: Tensor, levels: NoiseLevels, given: Conditions
) -> _Told:
    output = denoiser(latents, t.expand(len(latents)), given).float()  # [B, C, h, w]
    return _Told(to_x0(prediction, output, latents, levels), to_noise(prediction, output, latents, levels))


def _levels(
    noise_schedule: NoiseSchedule, prediction: PredictionType, timesteps: Tensor, latents: Tensor
) -> list[NoiseLevels]:
    """The noise level of each timestep, [1, 1, 1, 1] each, on the device of the latents."""
    _check_timesteps(timesteps, noise_schedule)
    levels = [noise_schedule.levels(t.view(1)) for t in timesteps.to(latents.device)]
    if prediction == "epsilon" and levels[0].alpha == 0:
        raise UserError(
            f"timesteps: found {timesteps[0]:g}, pure noise, with prediction epsilon; x_0 cannot be told from noise "
            "alone; begin at a lower timestep"
        )
    return levels


def _clean(latents: Tensor) -> NoiseLevels:
    return NoiseLevels(alpha=latents.new_ones(1, 1, 1, 1).float(), sigma=latents.new_zeros(1, 1, 1, 1).float())


def _check_timesteps(timesteps: Tensor, noise_schedule: NoiseSchedule) -> None:
    if timesteps.ndim != 1 or not len(timesteps) or bool((timesteps.diff() >= 0).any()):
        raise UserError(
            f"timesteps: found {_shown(timesteps)}; allowed is a list that goes down, one timestep a step; "
            "use those of the ddim scheduler, or of euler for flow"
        )
    flow, most = noise_schedule.config.schedule == "flow", noise_schedule.config.timesteps
    inside = (timesteps[-1] > 0) & (timesteps[0] <= most) if flow else (timesteps[-1] >= 0) & (timesteps[0] < most)
    if not inside:
        allowed = f"above 0 and up to {most}" if flow else f"0 to {most - 1}"
        raise UserError(
            f"timesteps: found {timesteps[0]:g} down to {timesteps[-1]:g}; allowed is {allowed}; use the scheduler's"
        )


def _check_inversion(refinements: int, least_noisy_alpha: float, timesteps: Tensor) -> None:
    if refinements < 0:
        raise UserError(f"refinements: found {refinements}; allowed is 0 or more; 2 is usual")
    if least_noisy_alpha < LEAST_SIGNAL:
        raise UserError(
            f"timesteps: found {_shown(timesteps)}, one step from x_0 to pure noise, which cannot be undone; "
            "allowed is a last timestep with signal left; take more steps"
        )


def _shown(timesteps: Tensor) -> str:
    values = timesteps.flatten().tolist()
    return str(values) if len(values) <= 6 else f"[{values[0]}, {values[1]}, ... {values[-1]}]"

"""Strong guidance without oversaturated colours: adaptive projection (arXiv 2410.02416), rescaling (2305.08891)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from ldm.noise import NoiseLevels, NoiseSchedule, convert, to_x0

SMALLEST_SIGMA = 1e-6
"""At noise level 0 the output says nothing about x_0, and v and flow could not be found back from it."""


@dataclass(frozen=True, kw_only=True)
class ApgOptions:
    """How the guidance's change of x_0 is tamed; the defaults do what the paper advises for any latent size.

    `eta`: how much is kept of the part that is parallel to the conditional x_0, which is what saturates colours; 1 is
    all. `norm_threshold`: the largest L2 norm over C, h, w of the change at guidance scale 2, None for no limit; it
    grows with the square root of the number of latents (the paper takes 2.5 to 15). `momentum`: what each step adds
    of the sum of the earlier ones, above -1 and below 1; negative, as the paper has it, pushes against them; 0 is none.

    Raises ValueError, field first.
    """

    eta: float = 0.0
    norm_threshold: float | None = None
    momentum: float = -0.5

    def __post_init__(self) -> None:
        if not (math.isfinite(self.eta) and self.eta >= 0):
            raise ValueError(f"eta: found {self.eta}; allowed is 0 or more; 1 keeps all, as without projection")
        if self.norm_threshold is not None and not (math.isfinite(self.norm_threshold) and self.norm_threshold > 0):
            raise ValueError(
                f"norm_threshold: found {self.norm_threshold}; allowed is a number above 0; leave it out for no limit"
            )
        if not -1 < self.momentum < 1:
            raise ValueError(
                f"momentum: found {self.momentum}; allowed is above -1 and below 1; 0 is none, -0.5 is usual"
            )


class ProjectedGuidance:
    """Momentum, norm limit and projection (arXiv 2410.02416, algorithm 1), on x_0 predictions.

    An instance remembers the earlier steps' directions, so each sampling run needs its own. A second-order sampler
    (heun) calls it twice a step, and each call counts for the momentum.
    """

    def __init__(self, options: ApgOptions, noise_schedule: NoiseSchedule) -> None:
        """`noise_schedule`: the one the network was trained with; it says what the network predicts, too."""
        self.options = options
        self.noise_schedule = noise_schedule
        self.average: Tensor | None = None  # [B, C, h, w]: the paper's running average, a sum weighed by momentum

    def __call__(self, direction: Tensor, conditional: Tensor, latents: Tensor, timesteps: Tensor) -> Tensor:
        """The tamed `direction`, [B, C, h, w].

        `direction` is a difference of outputs of the network, `conditional` the output that it is to be added to,
        `latents` x_t as the network sees it; all [B, C, h, w] float32. Raises ValueError for another batch than before.
        """
        prediction, levels = self.noise_schedule.config.prediction, levels_at(self.noise_schedule, timesteps)
        # x_0 is linear in (output, x_t) together, so a difference of outputs at one x_t converts with x_t = 0.
        nothing = torch.zeros_like(direction)
        x_0 = to_x0(prediction, conditional, latents, levels)  # [B, C, h, w]
        change = self._accumulate(to_x0(prediction, direction, nothing, levels))
        change = project(limit_norm(change, self.options.norm_threshold), x_0, self.options.eta)
        return convert("sample", prediction, change, nothing, levels)

    def _accumulate(self, change: Tensor) -> Tensor:
        """The paper's momentum: average = change + momentum * the average before."""
        if self.average is not None:
            if self.average.shape != change.shape:
                raise ValueError(
                    f"guidance: found shape {tuple(change.shape)} after {tuple(self.average.shape)}; "
                    "its momentum belongs to one sampling run; make a new one for the next"
                )
            change = change + self.options.momentum * self.average
        self.average = change
        return change


def limit_norm(change: Tensor, threshold: float | None) -> Tensor:
    """`change` [B, C, h, w], shortened where its L2 norm over C, h, w exceeds `threshold` (arXiv 2410.02416)."""
    if threshold is None:
        return change
    norm = change.flatten(1).norm(dim=1).view(-1, 1, 1, 1)  # [B, 1, 1, 1]
    return change * (threshold / norm).clamp(max=1)  # a norm of 0 gives infinity, clamped to 1


def project(change: Tensor, onto: Tensor, eta: float) -> Tensor:
    """`change` [B, C, h, w] with its part parallel to `onto` times `eta`, the orthogonal part whole (arXiv 2410.02416).

    Parallel and orthogonal are those of a sample's numbers as one vector.
    """
    unit = functional.normalize(onto.flatten(1)).view_as(onto)
    parallel = (change * unit).flatten(1).sum(1).view(-1, 1, 1, 1) * unit  # [B, C, h, w]
    return change + (eta - 1) * parallel


def rescale(guided: Tensor, conditional: Tensor, phi: float) -> Tensor:
    """`guided` [B, C, h, w] with a share `phi` of it brought to the standard deviation of `conditional`.

    Lin et al. (arXiv 2305.08891, eq. 15-16), the deviation over C, h, w of each sample:
    phi * guided * std(conditional) / std(guided) + (1 - phi) * guided.
    """
    wanted, found = (x.flatten(1).std(dim=1, correction=0).view(-1, 1, 1, 1) for x in (conditional, guided))
    factor = torch.where(found > 0, wanted / found, 1)  # [B, 1, 1, 1]
    return phi * factor * guided + (1 - phi) * guided


def levels_at(schedule: NoiseSchedule, timesteps: Tensor) -> NoiseLevels:
    """Noise levels at `timesteps` [B], fractions between two of a diffusion schedule's included, and never quite 0.

    diffusers' Euler and Heun pass fractions where they are spaced evenly. Between two timesteps the angle whose cosine
    is alpha and whose sine is sigma changes evenly, so that alpha^2 + sigma^2 stays 1.
    """
    if schedule.alphas_cumprod is None or not timesteps.is_floating_point():
        levels = schedule.levels(timesteps)
    else:
        low, high = (schedule.levels(end.long()) for end in (timesteps.floor(), timesteps.ceil()))
        share = (timesteps - timesteps.floor()).view(-1, 1, 1, 1)
        angle = torch.lerp(torch.atan2(low.sigma, low.alpha), torch.atan2(high.sigma, high.alpha), share.float())
        whole = share == 0  # the table's own numbers: cos(pi / 2) is not 0 in floating point
        levels = NoiseLevels(
            alpha=torch.where(whole, low.alpha, angle.cos()), sigma=torch.where(whole, low.sigma, angle.sin())
        )
    return NoiseLevels(alpha=levels.alpha, sigma=levels.sigma.clamp(min=SMALLEST_SIGMA))

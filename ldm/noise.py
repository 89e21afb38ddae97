"""Noise schedules and the four things a network may predict: pure functions of (x_0, noise, levels).

Everywhere x_t = alpha * x_0 + sigma * noise. Diffusion keeps alpha^2 + sigma^2 = 1; flow keeps alpha + sigma = 1.
The numbers come from diffusers' own `DDPMScheduler`, so training and every diffusers scheduler agree to the last bit.
Name trap: our `linear` and `scaled_linear` are diffusers'; latent-diffusion calls them `sqrt_linear` and `linear`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

ScheduleName = Literal["linear", "scaled_linear", "cosine", "flow"]
PredictionType = Literal["epsilon", "v_prediction", "sample", "flow"]


@dataclass(frozen=True, kw_only=True)
class NoiseConfig:
    """Which noise is added when, and what the network predicts from it.

    `timesteps` is T: diffusion uses the whole numbers 0..T-1, flow the real numbers (0, T]. `beta_start` and `beta_end`
    are read by `linear` and `scaled_linear` only. `zero_terminal_snr` rescales the betas so that the last step is pure
    noise (arXiv 2305.08891). `flow_shift` > 1 moves flow towards the noisy end (arXiv 2403.03206, eq. 23).
    """

    schedule: ScheduleName = "cosine"
    prediction: PredictionType = "v_prediction"
    timesteps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    zero_terminal_snr: bool = False
    flow_shift: float = 1.0

    def __post_init__(self) -> None:
        _one_of("schedule", self.schedule, get_args(ScheduleName))
        _one_of("prediction", self.prediction, get_args(PredictionType))
        if self.timesteps < 2:
            raise ValueError(f"timesteps: found {self.timesteps}; allowed is 2 or more; 1000 is usual")
        if not 0 < self.beta_start <= self.beta_end < 1:
            raise ValueError(
                f"beta_start: found {self.beta_start} with beta_end {self.beta_end}; "
                "allowed is 0 < beta_start <= beta_end < 1; 0.00085 and 0.012 are Stable Diffusion's"
            )
        if not self.flow_shift > 0:
            raise ValueError(f"flow_shift: found {self.flow_shift}; allowed is a number above 0; 1 means no shift")
        self._check_combination()

    def _check_combination(self) -> None:
        if (self.schedule == "flow") != (self.prediction == "flow"):
            raise ValueError(
                f"prediction: found {self.prediction} with schedule {self.schedule}; "
                "flow prediction and flow schedule go together only; set both to flow or neither"
            )
        if self.schedule == "flow" and self.zero_terminal_snr:
            raise ValueError(
                "zero_terminal_snr: found true with schedule flow; flow ends in pure noise by itself; leave it false"
            )
        if self.zero_terminal_snr and self.prediction == "epsilon":
            raise ValueError(
                "zero_terminal_snr: found true with prediction epsilon; x_0 cannot be told from noise alone; "
                "use prediction v_prediction or sample"
            )
        if self.flow_shift != 1 and self.schedule != "flow":
            raise ValueError(
                f"flow_shift: found {self.flow_shift} with schedule {self.schedule}; "
                "it acts on schedule flow only; leave it 1"
            )


def _one_of(field: str, found: object, allowed: tuple[str, ...]) -> None:
    if found not in allowed:
        raise ValueError(f"{field}: found {found!r}; allowed is {', '.join(allowed)}; choose one of these")


@dataclass(frozen=True)
class NoiseLevels:
    """x_t = alpha * x_0 + sigma * noise, one pair a sample."""

    alpha: Tensor  # [B, 1, 1, 1]
    sigma: Tensor  # [B, 1, 1, 1]

    @property
    def snr(self) -> Tensor:
        """Signal-to-noise ratio alpha^2 / sigma^2, [B]; 0 is pure noise."""
        return (self.alpha.square() / self.sigma.square()).flatten()  # [B]


class NoiseSchedule:
    """Turns timesteps into noise levels. Immutable; `to` returns a copy whose table lies on the device."""

    def __init__(self, config: NoiseConfig, alphas_cumprod: Tensor | None) -> None:
        self.config = config
        self.alphas_cumprod = alphas_cumprod  # [T] float32; None for flow, which has a formula instead

    @classmethod
    def from_config(cls, config: NoiseConfig) -> NoiseSchedule:
        """The schedule that `config` names, on the CPU."""
        if config.schedule == "flow":
            return cls(config, None)
        from diffusers import DDPMScheduler

        return cls(config, DDPMScheduler(**beta_arguments(config)).alphas_cumprod)

    def to(self, device: torch.device | str) -> NoiseSchedule:
        """The same schedule with its table on `device`."""
        table = self.alphas_cumprod
        return NoiseSchedule(self.config, None if table is None else table.to(device))

    def levels(self, timesteps: Tensor) -> NoiseLevels:
        """Noise levels at `timesteps` [B]: whole numbers 0..T-1 for diffusion; for flow t / T is sigma."""
        if self.alphas_cumprod is None:
            sigma = (timesteps.to(torch.float32) / self.config.timesteps).view(-1, 1, 1, 1)
            return NoiseLevels(alpha=1 - sigma, sigma=sigma)
        if timesteps.is_floating_point():
            raise TypeError("diffusion schedules are indexed by whole timesteps; only flow takes fractions")
        power = self.alphas_cumprod.to(timesteps.device)[timesteps].view(-1, 1, 1, 1)
        return NoiseLevels(alpha=power**0.5, sigma=(1 - power) ** 0.5)

    def add_noise(self, x_0: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x_t at `timesteps` [B], [B, C, h, w]."""
        return add_noise(x_0, noise, self.levels(timesteps))

    def snr(self, timesteps: Tensor) -> Tensor:
        """Signal-to-noise ratio at `timesteps`, [B]."""
        return self.levels(timesteps).snr


def beta_arguments(config: NoiseConfig) -> dict[str, Any]:
    """The keyword arguments by which every diffusers beta scheduler gets the schedule of `config`."""
    if config.schedule == "flow":
        raise ValueError("schedule: found flow; it has no betas; use a diffusers scheduler that knows flow")
    return {
        "num_train_timesteps": config.timesteps,
        "beta_start": config.beta_start,
        "beta_end": config.beta_end,
        "beta_schedule": "squaredcos_cap_v2" if config.schedule == "cosine" else config.schedule,
        "rescale_betas_zero_snr": config.zero_terminal_snr,
    }


def shift_sigma(sigma: Tensor, shift: float) -> Tensor:
    """Flow's resolution shift: shift * sigma / (1 + (shift - 1) * sigma) (arXiv 2403.03206, eq. 23)."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def add_noise(x_0: Tensor, noise: Tensor, levels: NoiseLevels) -> Tensor:
    """x_t = alpha * x_0 + sigma * noise (DDPM, arXiv 2006.11239, eq. 4), in the type of x_0."""
    return (levels.alpha * x_0 + levels.sigma * noise).to(x_0.dtype)  # [B, C, h, w]


def training_target(prediction: PredictionType, x_0: Tensor, noise: Tensor, levels: NoiseLevels) -> Tensor:
    """What a perfect network returns, [B, C, h, w].

    epsilon: noise. sample: x_0. v_prediction: alpha * noise - sigma * x_0 (arXiv 2202.00512). flow: noise - x_0, the
    velocity of the straight line from data to noise (arXiv 2209.03003; sign as in Stable Diffusion 3 and diffusers).
    """
    if prediction == "epsilon":
        return noise
    if prediction == "sample":
        return x_0
    if prediction == "v_prediction":
        return levels.alpha * noise - levels.sigma * x_0
    return noise - x_0


def to_x0(prediction: PredictionType, output: Tensor, x_t: Tensor, levels: NoiseLevels) -> Tensor:
    """x_0 as told by the network's `output` at x_t, [B, C, h, w].

    The denominators of v and flow are 1 on their own schedules; with them each formula is exact on every schedule.
    """
    alpha, sigma = levels.alpha, levels.sigma
    if prediction == "epsilon":
        return (x_t - sigma * output) / alpha
    if prediction == "sample":
        return output
    if prediction == "v_prediction":
        return (alpha * x_t - sigma * output) / (alpha.square() + sigma.square())
    return (x_t - sigma * output) / (alpha + sigma)


def to_noise(prediction: PredictionType, output: Tensor, x_t: Tensor, levels: NoiseLevels) -> Tensor:
    """The noise as told by the network's `output` at x_t, [B, C, h, w]."""
    alpha, sigma = levels.alpha, levels.sigma
    if prediction == "epsilon":
        return output
    if prediction == "sample":
        return (x_t - alpha * output) / sigma
    if prediction == "v_prediction":
        return (sigma * x_t + alpha * output) / (alpha.square() + sigma.square())
    return (x_t + alpha * output) / (alpha + sigma)


def convert(source: PredictionType, target: PredictionType, output: Tensor, x_t: Tensor, levels: NoiseLevels) -> Tensor:
    """The same prediction in another form: convert("epsilon", "v_prediction", ...), [B, C, h, w]."""
    if source == target:
        return output
    x_0 = to_x0(source, output, x_t, levels)
    noise = to_noise(source, output, x_t, levels)
    return training_target(target, x_0, noise, levels)

"""The diffusion loss of each sample: which timestep it trains, how the error is measured and weighed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from ldm.noise import NoiseConfig, shift_sigma

Weighting = Literal["none", "min_snr"]
TimestepSampling = Literal["uniform", "logit_normal"]
LossKind = Literal["l2", "l1"]


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """How the network's error becomes a loss.

    `min_snr` is arXiv 2303.09556 with gamma `min_snr_gamma`; `min_snr_floor` keeps the noisiest steps from weighing
    nothing (see `loss_weights`). `logit_normal` draws sigmoid(N(logit_mean, logit_std)) (Stable Diffusion 3,
    arXiv 2403.03206, eq. 19) as the fraction of the way to pure noise.
    """

    weighting: Weighting = "min_snr"
    min_snr_gamma: float = 5.0
    min_snr_floor: float = 0.05
    timestep_sampling: TimestepSampling = "uniform"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    loss: LossKind = "l2"

    def __post_init__(self) -> None:
        for field, allowed in (("weighting", Weighting), ("timestep_sampling", TimestepSampling), ("loss", LossKind)):
            found, names = getattr(self, field), get_args(allowed)
            if found not in names:
                raise ValueError(f"{field}: found {found!r}; allowed is {', '.join(names)}; choose one of these")
        if not self.min_snr_gamma > 0:
            raise ValueError(f"min_snr_gamma: found {self.min_snr_gamma}; allowed is a number above 0; 5 is usual")
        if not 0 <= self.min_snr_floor < self.min_snr_gamma:
            raise ValueError(
                f"min_snr_floor: found {self.min_snr_floor}; allowed is 0 up to min_snr_gamma "
                f"({self.min_snr_gamma}); 0.05 is the default"
            )
        if not self.logit_std > 0:
            raise ValueError(f"logit_std: found {self.logit_std}; allowed is a number above 0; 1 is usual")


def timesteps_from_uniforms(config: ObjectiveConfig, noise: NoiseConfig, uniforms: Tensor) -> Tensor:
    """Timesteps [B] by inverse distribution function of `uniforms` [B] in [0, 1), so the caller owns the randomness.

    Diffusion: int64 in 0..T-1. Flow: float32 in (0, T], shifted by `noise.flow_shift`.
    """
    fraction = uniforms.double()  # [B]
    if config.timestep_sampling == "logit_normal":
        normal = torch.special.ndtri(fraction.clamp(1e-9, 1 - 1e-9))
        fraction = torch.sigmoid(config.logit_mean + config.logit_std * normal)
    if noise.schedule != "flow":
        return (fraction * noise.timesteps).long().clamp(max=noise.timesteps - 1)
    # sigma = 0 is clean data, where there is nothing to learn and the signal-to-noise ratio is infinite.
    sigma = shift_sigma(fraction.clamp(min=1e-5), noise.flow_shift)
    return (sigma * noise.timesteps).float()


def loss_weights(config: ObjectiveConfig, noise: NoiseConfig, snr: Tensor) -> Tensor:
    """Weight of each sample's loss from its signal-to-noise ratio, [B] -> [B] float32.

    min-SNR weighs the error of x_0 by m = min(snr, gamma) (arXiv 2303.09556, eq. 6). As the error of x_0 is that of
    epsilon / snr, of v / (snr + 1), of flow * sigma^2, the weights are
        sample: m     epsilon: m / snr     v_prediction: m / (snr + 1)     flow: m * sigma^2.
    All but epsilon's vanish towards pure noise, so the last step of a zero-terminal-SNR schedule, from which sampling
    starts, would never be trained: there m is max(m, `min_snr_floor`).
    """
    snr = snr.float()
    if config.weighting == "none":
        return torch.ones_like(snr)
    if noise.prediction == "epsilon":
        return config.min_snr_gamma / snr.clamp(min=config.min_snr_gamma)  # = min(snr, gamma) / snr, also at snr 0
    weight = snr.clamp(config.min_snr_floor, config.min_snr_gamma)
    if noise.prediction == "v_prediction":
        return weight / (snr + 1)
    if noise.prediction == "flow":
        return weight / (snr.sqrt() + 1).square()  # sigma = 1 / (sqrt(snr) + 1) on the straight line
    return weight


def diffusion_loss(output: Tensor, target: Tensor, weights: Tensor, loss: LossKind = "l2") -> Tensor:
    """weights * mean over C, h, w of |output - target|^2 (or of the absolute error), [B] float32.

    `output` and `target` are [B, C, h, w] of any floating type; `weights` is [B]. DDPM (arXiv 2006.11239), eq. 14.
    """
    error = output.float() - target.float()  # [B, C, h, w]
    error = error.square() if loss == "l2" else error.abs()
    return weights * error.flatten(1).mean(1)  # [B]

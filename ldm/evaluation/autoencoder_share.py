"""From bits per latent dimension to bits per pixel: what the autoencoder adds to the bound on -log p(image).

For an autoencoder with a posterior q(z|x) (arXiv 1312.6114, eq. 2 and 3), with the latents' own bound in it:

    -log p(x) <= E_q[-log p(x|z)] + E_q[log q(z|x)] + E_q[-log p(z)]
                 distortion         - entropy         the latents' variational bound

The decoder gives pictures, not probabilities, so p(x|z) is stated: each 8-bit value is Laplace-distributed about the
reconstruction, discretised to the 256 values, with one scale for the whole set. A VQ autoencoder has no density q, so
nothing can be added: its bound is of latents alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from autoencoder.latents import Moments
from autoencoder.model import Autoencoder
from ldm.evaluation.likelihood import VariationalBound
from ldm.evaluation.measurement import check_count
from ldm.evaluation.scaled_latents import scaled_moments

SCALES = tuple(0.25 * 2 ** (i / 2) for i in range(17))
"""Laplace scales that are tried, in steps of 255: 0.25 to 64."""


@dataclass(frozen=True)
class AutoencoderShare:
    """Bits per pixel and channel of the images. `total` bounds -log2 p(image); `rate` + `distortion` is `total`."""

    total: float
    rate: float
    """What the latents cost: their bound less the posterior's entropy."""
    distortion: float
    """What the reconstruction leaves to be told."""
    scale: float
    """Laplace scale of the likelihood, in steps of 255: the best of `SCALES` for these images."""
    n: int
    dimensions: int

    def line(self) -> str:
        """`5.1 bits per pixel and channel = latents 1.2 + autoencoder 3.9`."""
        return (
            f"{self.total:.4g} bits per pixel and channel = latents {self.rate:.4g} + "
            f"autoencoder {self.distortion:.4g} (discretised Laplace of scale {self.scale:.3g}/255); n = {self.n}"
        )


class ShareMeter:
    """Gathers the autoencoder's part over batches; `result` adds the latents' bound of the same images."""

    def __init__(self) -> None:
        self._distortions = torch.zeros(len(SCALES), dtype=torch.float64)  # sums of nats per image
        self._entropy, self._count, self._pixels, self._latents = 0.0, 0, 0, 0

    @torch.no_grad()
    def update(self, autoencoder: Autoencoder, moments: Moments, images: Tensor, reconstructions: Tensor) -> None:
        """`reconstructions` [B, 3, H, W] are decoded from a sample of `moments`, the posterior of `images`."""
        values = ((images.double() / 2 + 0.5).clamp(0, 1) * 255).round().cpu()
        means = (reconstructions.double() / 2 + 0.5).clamp(0, 1).cpu() * 255
        for i, scale in enumerate(SCALES):
            self._distortions[i] += discretised_laplace(values, means, scale).sum()
        self._entropy += entropy(scaled_moments(autoencoder, moments)).sum().item()
        self._count += len(images)
        self._pixels, self._latents = images[0].numel(), moments.mean[0].numel()

    def result(self, bound: VariationalBound) -> AutoencoderShare:
        """Raises `UserError` without images."""
        check_count("data", self._count, 1, "bits per pixel")
        best = int(self._distortions.argmin())
        bits = math.log(2) * self._pixels
        rate = (bound.total.value * math.log(2) * self._latents - self._entropy / self._count) / bits
        distortion = (self._distortions[best] / self._count).item() / bits
        return AutoencoderShare(rate + distortion, rate, distortion, SCALES[best], self._count, self._pixels)


def discretised_laplace(values: Tensor, means: Tensor, scale: float) -> Tensor:
    """-log P(value) in nats: the Laplace mass of [value - 1/2, value + 1/2], the tails added to 0 and 255."""
    upper = torch.where(values >= 255, torch.inf, values + 0.5 - means)
    lower = torch.where(values <= 0, -torch.inf, values - 0.5 - means)
    return -_log_mass(lower / scale, upper / scale)


def _log_mass(lower: Tensor, upper: Tensor) -> Tensor:
    """log of the standard Laplace mass of [lower, upper], exact far out too."""
    flipped = lower > 0
    lower, upper = torch.where(flipped, -upper, lower), torch.where(flipped, -lower, upper)  # now lower <= 0
    left = upper - math.log(2) + torch.log(-torch.expm1((lower - upper).clamp(max=-1e-300)))  # both ends below 0
    across = torch.log1p(-0.5 * (lower.exp() + (-upper).exp()))
    return torch.where(upper <= 0, left, across)


def entropy(moments: Moments) -> Tensor:
    """Entropy of N(mean, exp(logvar)) in nats, summed over C, h, w: [B]. It changes with the latents' scale."""
    return (0.5 * (math.log(2 * math.pi * math.e) + moments.logvar.double())).flatten(1).sum(1).cpu()

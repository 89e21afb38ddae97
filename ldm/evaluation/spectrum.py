"""How strong each spatial frequency is: radial power spectra of images, reconstructions and latents."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.evaluation.measurement import check_count

BANDS = 8
"""Rings of equal width from 0 to the Nyquist frequency (half a cycle a pixel); the corners beyond it are left out."""


def radial_power(images: Tensor, bands: int = BANDS) -> Tensor:
    """Mean power of each ring of frequencies, [B, bands] float64, of [B, C, H, W]; channels are averaged.

    Each channel's mean is taken out, and a Hann window keeps the edges, where a picture is not periodic, from looking
    like high frequencies. In units of the values' variance: white noise of variance 1 gives about 1 in every band.
    """
    values = images.double()
    height, width = values.shape[-2:]
    window = torch.outer(_hann(height), _hann(width)).to(values.device)
    centred = values - values.mean(dim=(-2, -1), keepdim=True)
    spectra = torch.fft.fft2(centred * window).abs().square().mean(1) / window.square().sum()  # [B, H, W]
    rings = _rings(height, width, bands).to(values.device)  # [H, W], `bands` beyond Nyquist
    sums = torch.zeros(len(values), bands + 1, dtype=torch.float64, device=values.device)
    sums.index_add_(1, rings.flatten(), spectra.flatten(1))
    counts = torch.bincount(rings.flatten(), minlength=bands + 1).clamp_min(1)
    return (sums / counts)[:, :bands].cpu()


def band_limits(bands: int = BANDS) -> list[tuple[float, float]]:
    """From and to of each band in cycles per pixel."""
    return [(0.5 * i / bands, 0.5 * (i + 1) / bands) for i in range(bands)]


def _hann(length: int) -> Tensor:
    return (
        torch.hann_window(length + 1, periodic=False, dtype=torch.float64)[:-1]
        if length > 1
        else torch.ones(1).double()
    )


def _rings(height: int, width: int, bands: int) -> Tensor:
    """Which band each frequency of `fft2` belongs to, int64 [H, W]."""
    down = torch.fft.fftfreq(height, dtype=torch.float64)[:, None]
    across = torch.fft.fftfreq(width, dtype=torch.float64)[None]
    radius = (down.square() + across.square()).sqrt()
    return (radius * 2 * bands).floor().long().clamp(max=bands)


@dataclass(frozen=True)
class Spectra:
    """Per band, from low to high frequencies."""

    limits: list[tuple[float, float]]
    """Cycles per pixel."""
    images: list[float]
    """Power of the originals, in [0, 1] squared."""
    survives: list[float]
    """Power of the reconstructions over that of the originals: 1 is all of it, above 1 is invented."""
    error: list[float]
    """Power of the difference over that of the originals: what survives but lies elsewhere is an error too."""
    latents: list[float]
    """Power of the posterior's mean, as the U-Net sees it, in its own cycles per latent."""
    n: int

    def high_frequencies(self) -> float:
        """Share of the energy in the upper half of the bands that survives."""
        half = len(self.images) // 2
        kept = sum(power * share for power, share in zip(self.images[half:], self.survives[half:], strict=True))
        return kept / max(sum(self.images[half:]), 1e-30)


class SpectrumMeter:
    """Gathers spectra over batches."""

    def __init__(self) -> None:
        self._sums = torch.zeros(4, BANDS, dtype=torch.float64)
        self._count = 0

    def update(self, originals: Tensor, reconstructions: Tensor, latents: Tensor) -> None:
        """Images [B, 3, H, W] in [0, 1] and latents [B, C, h, w]."""
        for i, values in enumerate((originals, reconstructions, reconstructions - originals, latents)):
            self._sums[i] += radial_power(values).sum(0)
        self._count += len(originals)

    def result(self) -> Spectra:
        """Raises `UserError` without images."""
        check_count("data", self._count, 1, "spectrum")
        images, reconstructions, errors, latents = self._sums / self._count
        floor = images.clamp_min(1e-30)
        return Spectra(
            band_limits(),
            images.tolist(),
            (reconstructions / floor).tolist(),
            (errors / floor).tolist(),
            latents.tolist(),
            self._count,
        )

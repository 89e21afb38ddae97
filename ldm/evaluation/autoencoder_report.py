"""Is the autoencoder good enough? Everything about its reconstructions and latents, in one pass over the images."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from diffusers import VQModel
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from autoencoder.latents import LatentStatistics, decode, encode, quantise
from autoencoder.model import Autoencoder, latent_channels
from ldm.evaluation.bootstrap import mean_estimate, metric_seed
from ldm.evaluation.codebook import CodebookMeter, CodebookUse
from ldm.evaluation.features import NOT_RESIZED, FeatureExtractor, FeatureGatherer, FeatureSet
from ldm.evaluation.frechet import fid
from ldm.evaluation.measurement import Better, Measurement, Setting, check_count
from ldm.evaluation.reconstruction import as_saved
from ldm.evaluation.reference import make_reference
from ldm.evaluation.scaled_latents import scaled_moments
from ldm.evaluation.spectrum import Spectra, SpectrumMeter

WORST = 10
Lpips = Callable[[Tensor, Tensor], Tensor]
_KINDS: dict[str, tuple[str, Better, str]] = {
    "psnr": ("PSNR", "higher", "dB"),
    "ssim": ("SSIM", "higher", ""),
    "lpips": ("LPIPS", "lower", ""),
}


@dataclass(frozen=True)
class LatentSummary:
    """Per channel, of samples of the posterior as the U-Net sees them."""

    mean: list[float]
    std: list[float]
    correlation: list[list[float]]
    """[C][C]: what one channel tells of another, over all positions."""
    shape: list[int]
    """Channels, height, width."""


@dataclass(frozen=True)
class WorstImage:
    """An image that is reconstructed badly, by its place in the measured order."""

    index: int
    psnr: float
    lpips: float | None
    original: Tensor
    """[3, H, W] in [0, 1]."""
    reconstruction: Tensor


@dataclass(frozen=True)
class AutoencoderReport:
    """`measurements` are PSNR, SSIM, LPIPS if there are weights, rFID if there is an extractor."""

    measurements: tuple[Measurement, ...]
    latents: LatentSummary
    spectra: Spectra
    codebook: CodebookUse | None
    """None for a KL autoencoder."""
    worst: tuple[WorstImage, ...]
    """The ten of the greatest LPIPS, or the least PSNR without it, the worst first."""
    n: int


@torch.no_grad()
def measure_autoencoder(
    autoencoder: Autoencoder,
    batches: Iterable[Tensor],
    *,
    lpips: Lpips | None = None,
    lpips_name: str = "LPIPS",
    extractor: FeatureExtractor | None = None,
    seed: int = 0,
    replicates: int = 100,
) -> AutoencoderReport:
    """Reconstruct the posterior mean of images [B, 3, H, W] in [-1, 1], all of one size.

    `lpips(images, reconstructions)` gives one distance per image, [B]; `extractor` is what rFID, the FID of the
    reconstructions against the images themselves, is seen through. Both pictures are rounded to 8 bits first. Raises
    `UserError` for no image, and with an extractor for one.
    """
    meter = _Meter(autoencoder, lpips)
    seen = None if extractor is None else (FeatureGatherer(extractor), FeatureGatherer(extractor, "reconstructions"))
    for images in batches:
        originals, reconstructions = meter.update(images)
        if seen is not None:
            seen[0].add(originals * 2 - 1)
            seen[1].add(reconstructions * 2 - 1)
    check_count("data", meter.count, 1, "autoencoder report")
    measurements = meter.measurements(seed, lpips_name)
    if seen is not None:
        measurements.append(_rfid(seen[0].result(), seen[1].result(), seed, replicates))
    return AutoencoderReport(
        tuple(measurements),
        meter.latents(),
        meter.spectra.result(),
        None if meter.codebook is None else meter.codebook.result(),
        meter.worst(),
        meter.count,
    )


class _Meter:
    """All that is gathered batch by batch."""

    def __init__(self, autoencoder: Autoencoder, lpips: Lpips | None) -> None:
        self._autoencoder, self._lpips = autoencoder, lpips
        self._statistics = LatentStatistics(latent_channels(autoencoder))
        self._shape: list[int] = []
        self._scores: dict[str, list[float]] = {name: [] for name in _KINDS}
        self._worst: list[WorstImage] = []
        self._resolution = 0
        self.spectra = SpectrumMeter()
        vq = isinstance(autoencoder, VQModel)
        self.codebook = CodebookMeter(autoencoder.config.num_vq_embeddings) if vq else None
        self.count = 0

    def update(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        """Measure images [B, 3, H, W] in [-1, 1]; returns them and their reconstructions in [0, 1], of 8 bits."""
        parameter = next(self._autoencoder.parameters())
        moments = encode(self._autoencoder, batch.to(parameter))
        originals = as_saved(batch.to(parameter.device))
        reconstructions = as_saved(decode(self._autoencoder, moments.mean.to(parameter.dtype)))
        scaled = scaled_moments(self._autoencoder, moments)
        self._statistics.update(scaled)
        self._shape, self._resolution = list(scaled.mean.shape[1:]), batch.shape[-1]
        self.spectra.update(originals, reconstructions, scaled.mean)
        if self.codebook is not None:
            self.codebook.update(quantise(self._autoencoder, moments.mean).indices)
        self._score(originals, reconstructions)
        return originals, reconstructions

    def _score(self, originals: Tensor, reconstructions: Tensor) -> None:
        pairs = zip(reconstructions, originals, strict=True)
        most = 10 * math.log10(255**2 * originals[0].numel())  # one value off by one: an exact image is no better
        psnr = [min(most, peak_signal_noise_ratio(found, wanted, data_range=1.0).item()) for found, wanted in pairs]
        ssim = structural_similarity_index_measure(reconstructions, originals, reduction="none", data_range=1.0)
        self._scores["psnr"] += psnr
        self._scores["ssim"] += ssim.reshape(-1).tolist()  # type: ignore[union-attr]
        distances = None if self._lpips is None else self._lpips(originals * 2 - 1, reconstructions * 2 - 1).tolist()
        self._scores["lpips"] += distances or []
        candidates = [
            WorstImage(self.count + i, psnr[i], distances[i] if distances else None, original.cpu(), found.cpu())
            for i, (original, found) in enumerate(zip(originals, reconstructions, strict=True))
        ]
        self._worst = sorted([*self._worst, *candidates], key=_badness)[:WORST]
        self.count += len(originals)

    def measurements(self, seed: int, lpips_name: str) -> list[Measurement]:
        """PSNR, SSIM and LPIPS with their intervals."""
        found = []
        for name, (label, better, unit) in _KINDS.items():
            if self._scores[name]:
                estimate = mean_estimate(torch.tensor(self._scores[name]), metric_seed(seed, name))
                extractor = lpips_name if name == "lpips" else "pixels"
                setting = Setting(
                    n=self.count,
                    resolution=self._resolution,
                    extractor=extractor,
                    resize_filter=NOT_RESIZED,
                    reference="the images themselves",
                )
                found.append(Measurement(name, label, better, estimate, setting, unit))
        return found

    def latents(self) -> LatentSummary:
        """Mean, deviation and correlation of the channels."""
        covariance, std = self._statistics.covariance, self._statistics.std
        scale = torch.outer(std, std).clamp_min(1e-30)
        return LatentSummary(self._statistics.mean.tolist(), std.tolist(), (covariance / scale).tolist(), self._shape)

    def worst(self) -> tuple[WorstImage, ...]:
        """The worst first."""
        return tuple(self._worst)


def _badness(image: WorstImage) -> tuple[float, int]:
    """Ascending from the worst."""
    return (image.psnr if image.lpips is None else -image.lpips, image.index)


def _rfid(originals: FeatureSet, reconstructions: FeatureSet, seed: int, replicates: int) -> Measurement:
    reference = make_reference(originals, "the images themselves", "reconstructed images")
    estimate = fid(reconstructions.features.pooled, reference.pooled, metric_seed(seed, "rfid"), replicates)
    setting = Setting(
        n=len(reconstructions),
        resolution=reconstructions.resolution,
        extractor=reconstructions.seen_through,
        resize_filter=reconstructions.resize_filter,
        reference=reference.name,
        reference_n=len(reference),
    )
    return Measurement("rfid", "rFID", "lower", estimate, setting)

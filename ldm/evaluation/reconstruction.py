"""How well an autoencoder gives images back, and what its latents look like."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from autoencoder.latents import LatentStatistics, decode, encode
from autoencoder.model import Autoencoder, latent_channels
from ldm.errors import UserError
from ldm.picture import grid, to_pil

if TYPE_CHECKING:
    from PIL.Image import Image

PICTURES = 8
"""Images shown side by side with their reconstructions."""


@dataclass(frozen=True)
class ReconstructionReport:
    """Means over `images` images; both pictures are rounded to 8 bits first, as they would be saved."""

    images: int
    resolution: int
    psnr: float  # dB
    ssim: float  # 0..1, torchmetrics' defaults: Gaussian window 11, sigma 1.5
    lpips: float | None  # lower is better; None where no LPIPS weights were given
    latent_mean: list[float]  # per channel, of posterior samples
    latent_std: list[float]
    latent_shape: list[int]  # channels, height, width

    def summary(self) -> str:
        lpips = "" if self.lpips is None else f", LPIPS {self.lpips:.4f}"
        return f"PSNR {self.psnr:.2f} dB, SSIM {self.ssim:.4f}{lpips} on {self.images} images at {self.resolution} px"

    def numbers(self) -> dict[str, float]:
        values = {"psnr": self.psnr, "ssim": self.ssim}
        return values if self.lpips is None else {**values, "lpips": self.lpips}

    def to_json(self) -> dict[str, object]:
        return asdict(self)


@torch.no_grad()
def measure_reconstructions(
    autoencoder: Autoencoder, batches: Iterable[Tensor], lpips: Callable[[Tensor, Tensor], Tensor] | None = None
) -> tuple[ReconstructionReport, Image]:
    """Reconstruct the posterior mean of images [B, 3, H, W] in [-1, 1]; returns figures and a side-by-side picture.

    `lpips(images, reconstructions)` gives one distance per image, [B]. Raises `UserError` on an empty set.
    """
    device = next(autoencoder.parameters()).device
    psnr: list[Tensor] = []
    ssim: list[Tensor] = []
    distance: list[Tensor] = []
    gallery = _Gallery()
    statistics = LatentStatistics(latent_channels(autoencoder))
    resolution, latent_shape = 0, [0]
    for batch in batches:
        images = batch.to(device)
        moments = encode(autoencoder, images)
        statistics.update(moments)
        reconstructions = as_saved(decode(autoencoder, moments.mean))
        originals = as_saved(images)
        psnr += [peak_signal_noise_ratio(r, o, data_range=1.0) for r, o in zip(reconstructions, originals, strict=True)]
        ssim.append(structural_similarity_index_measure(reconstructions, originals, reduction="none", data_range=1.0))
        if lpips is not None:
            distance.append(lpips(originals * 2 - 1, reconstructions * 2 - 1))
        for pair in zip(originals.cpu(), reconstructions.cpu(), strict=True):
            gallery.offer(pair)
        resolution, latent_shape = images.shape[-1], list(moments.mean.shape[1:])
    if not psnr:
        raise UserError("no image to measure; give a data set with at least one")
    report = ReconstructionReport(
        images=len(psnr),
        resolution=resolution,
        psnr=torch.stack(psnr).mean().item(),
        ssim=torch.cat([value.reshape(-1) for value in ssim]).mean().item(),
        lpips=torch.cat(distance).mean().item() if distance else None,
        latent_mean=statistics.mean.tolist(),
        latent_std=statistics.std.tolist(),
        latent_shape=latent_shape,
    )
    return report, side_by_side(gallery.chosen())


class _Gallery:
    """A few pairs spread evenly over a stream of unknown length: a sorted folder must not show its first class only."""

    def __init__(self) -> None:
        self._kept: list[tuple[Tensor, Tensor]] = []
        self._stride, self._seen = 1, 0

    def offer(self, pair: tuple[Tensor, Tensor]) -> None:
        if self._seen % self._stride == 0:
            self._kept.append(pair)
        self._seen += 1
        if len(self._kept) == 2 * PICTURES:
            self._kept, self._stride = self._kept[::2], 2 * self._stride

    def chosen(self) -> list[tuple[Tensor, Tensor]]:
        count = min(PICTURES, len(self._kept))
        return [self._kept[i * len(self._kept) // count] for i in range(count)]


def as_saved(images: Tensor) -> Tensor:
    """[-1, 1] -> [0, 1] rounded to 8 bits."""
    return ((images.float() / 2 + 0.5).clamp(0, 1) * 255).round() / 255


def side_by_side(pairs: list[tuple[Tensor, Tensor]]) -> Image:
    """Originals in the upper row, reconstructions below; images [3, H, W] in [0, 1]."""
    originals = to_pil(torch.stack([original for original, _ in pairs]) * 2 - 1)
    reconstructions = to_pil(torch.stack([reconstruction for _, reconstruction in pairs]) * 2 - 1)
    captions = ["original"] * len(pairs) + ["reconstruction"] * len(pairs)
    return grid(originals + reconstructions, captions=captions, columns=len(pairs))

"""Our autoencoder's latents as features."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from autoencoder.latents import encode, to_unet
from autoencoder.model import Autoencoder, downsampling_factor, latent_channels, weights_hash
from ldm.errors import UserError
from ldm.evaluation.features import RESIZE_FILTER, Features, resized

MOST_FEATURES = 1024


class LatentExtractor:
    """Always there, offline, but it sees no more than the autoencoder keeps.

    The posterior's mean as the U-Net sees it, averaged over areas to at most 1,024 numbers. A `FeatureExtractor`.
    """

    name = "autoencoder latents"

    def __init__(self, autoencoder: Autoencoder, resolution: int) -> None:
        """Raises `UserError` if `resolution` is no multiple of the autoencoder's downsampling factor."""
        factor = downsampling_factor(autoencoder)
        if resolution % factor:
            raise UserError(
                f"extractor autoencoder: found {resolution} px; allowed is a multiple of {factor}; resize or crop"
            )
        self._autoencoder = autoencoder
        self.weights, self.resolution, self.resize_filter = weights_hash(autoencoder), resolution, RESIZE_FILTER
        side = resolution // factor
        channels = latent_channels(autoencoder)
        self._side = min(side, max(1, int((MOST_FEATURES / channels) ** 0.5)))

    @torch.no_grad()
    def extract(self, images: Tensor) -> Features:
        """Images [B, 3, H, W] in [-1, 1] -> pooled features [B, C * s * s]."""
        parameter = next(self._autoencoder.parameters())
        pixels = resized(images.to(parameter.device), self.resolution) * 2 - 1
        latents = to_unet(self._autoencoder, encode(self._autoencoder, pixels.to(parameter.dtype)).mean)
        pooled = F.adaptive_avg_pool2d(latents.float(), self._side)  # [B, C, s, s]
        return Features(pooled.flatten(1).cpu())

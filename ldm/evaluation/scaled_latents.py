"""Posterior moments as the U-Net sees them."""

from __future__ import annotations

import torch

from autoencoder.latents import Moments, to_unet
from autoencoder.model import Autoencoder


def scaled_moments(autoencoder: Autoencoder, moments: Moments) -> Moments:
    """The posterior of scaled latents: mean and log-variance under `to_unet`, which is affine in every channel."""
    zero = torch.zeros_like(moments.mean[:1])
    scale = to_unet(autoencoder, zero + 1) - to_unet(autoencoder, zero)  # [1, C, h, w]
    return Moments(to_unet(autoencoder, moments.mean), moments.logvar + 2 * scale.log())

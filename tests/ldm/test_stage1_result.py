"""How the latents of a finished stage 1 are scaled."""

from __future__ import annotations

import pytest
import torch

from autoencoder import AutoencoderConfig, build_autoencoder, decode, encode
from ldm.training.stage1_result import normalise_latents


@pytest.mark.parametrize("scale", ["channel", "overall"])
def test_latents_are_scaled_by_channel_or_by_one_factor(scale):
    torch.manual_seed(0)
    config = AutoencoderConfig(channels=(8, 16), norm_groups=4, layers_per_block=1, initial_logvar=-20)
    autoencoder = build_autoencoder(config).eval()
    images = torch.rand(32, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        raw = encode(autoencoder, images).mean
        before = decode(autoencoder, raw)
        normalise_latents(autoencoder, [images[:20], images[20:]], scale)
        latents = encode(autoencoder, images).mean
        torch.testing.assert_close(decode(autoencoder, latents), before, rtol=1e-4, atol=1e-4)
    channels = latents.std(dim=(0, 2, 3), correction=0)
    if scale == "channel":
        torch.testing.assert_close(channels, torch.ones(4), rtol=1e-3, atol=0)
        assert latents.mean(dim=(0, 2, 3)).abs().max() < 1e-3
    else:
        assert latents.std(correction=0).item() == pytest.approx(1, rel=1e-3)
        torch.testing.assert_close(latents, raw / raw.std(correction=0), rtol=1e-3, atol=1e-3)

"""Tiny random pipelines: every part real, 2 seconds to build, milliseconds to run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import pytest
import torch

from autoencoder.model import AutoencoderConfig, build_autoencoder
from conditioning.text import TextConfig, build_text_encoder
from ldm.noise import NoiseConfig
from ldm.pipeline import LatentDiffusionPipeline
from ldm.sampling import make_scheduler
from ldm.unet import UNetConfig, build_unet


def build_pipeline(
    noise_config: NoiseConfig,
    scheduler: str = "dpm++",
    *,
    kind: Literal["kl", "vq"] = "kl",
    text: bool = True,
) -> LatentDiffusionPipeline:
    """16 x 16 latents of 32 px images (downsampling 2), a one-layer text tower, a two-level U-Net.

    Fresh networks give tiny outputs and hardly read the text: their last layer and the embeddings are scaled up so that
    predictions have a standard deviation of about one and prompts matter.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        autoencoder_config = AutoencoderConfig(
            kind=kind, channels=(8, 16), latent_channels=4, norm_groups=4, layers_per_block=1, codebook_size=32
        )
        vae = build_autoencoder(autoencoder_config)
        text_config = TextConfig(encoder="trained", width=16, layers=1, heads=2, length=16)
        encoder = build_text_encoder(text_config) if text else None
        unet = build_unet(
            UNetConfig(channels=(16, 32), layers_per_block=1, attention=(False, True), heads=2, norm_groups=8),
            latent_channels=4,
            context_width=16 if text else None,
            sample_size=16,
        )
        with torch.no_grad():
            unet.conv_out.weight *= 20
            vae.decoder.conv_out.weight *= 5
    pipeline = LatentDiffusionPipeline(vae, encoder, unet, make_scheduler(scheduler, noise_config), name="tiny")
    return pipeline.to("cpu", torch.float32)


@pytest.fixture(scope="session")
def make_pipeline() -> Callable[..., LatentDiffusionPipeline]:
    """The function above, for tests that need a pipeline of their own."""
    return build_pipeline


@pytest.fixture(scope="session")
def tiny_pipeline() -> LatentDiffusionPipeline:
    """A v-prediction model with the cosine schedule. Shared: do not change it."""
    return build_pipeline(NoiseConfig())

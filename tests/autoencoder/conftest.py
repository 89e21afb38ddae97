"""Tiny autoencoders, images and random LPIPS trunks. No network, no real weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from autoencoder import Autoencoder, AutoencoderConfig, build_autoencoder, encode

VGG16 = {0: 64, 2: 64, 5: 128, 7: 128, 10: 256, 12: 256, 14: 256, 17: 512, 19: 512, 21: 512, 24: 512, 26: 512, 28: 512}


@pytest.fixture
def images() -> Tensor:
    """[16, 3, 32, 32] in [-1, 1]: smooth, each with its own colours, so that latents vary."""
    generator = torch.Generator().manual_seed(1)
    coarse = torch.rand(16, 3, 4, 4, generator=generator) * 2 - 1
    return nn.functional.interpolate(coarse, size=(32, 32), mode="bilinear", align_corners=False)


@pytest.fixture
def make(images: Tensor) -> Callable[..., Autoencoder]:
    """`make(kind, **fields)`: a tiny autoencoder; the codes of a VQ one are latents of the images, so all are used."""

    def build(kind: str, **fields: object) -> Autoencoder:
        torch.manual_seed(0)
        tiny = {"channels": (8, 16), "norm_groups": 4, "layers_per_block": 1, "codebook_size": 24, **fields}
        autoencoder = build_autoencoder(AutoencoderConfig(kind=kind, **tiny))
        if kind == "vq":
            with torch.no_grad():
                latents = encode(autoencoder, images).mean.permute(0, 2, 3, 1).flatten(0, 2)
                codes = autoencoder.quantize.embedding.weight
                codes.copy_(latents[torch.linspace(0, len(latents) - 1, len(codes)).long()])
        return autoencoder

    return build


@pytest.fixture(scope="session")
def vgg_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights under the names and shapes of torchvision's VGG16."""
    generator = torch.Generator().manual_seed(0)
    weights, channels = {}, 3
    for index, width in VGG16.items():
        scale = (2.0 / (9 * channels)) ** 0.5
        weights[f"features.{index}.weight"] = torch.randn(width, channels, 3, 3, generator=generator) * scale
        weights[f"features.{index}.bias"] = torch.zeros(width)
        channels = width
    path = tmp_path_factory.mktemp("vgg") / "vgg16-random.safetensors"
    save_file(weights, path)
    return path

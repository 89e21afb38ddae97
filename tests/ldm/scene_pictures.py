"""What tests of built-in scenes share: when emoji can be drawn, and pictures as a model would spoil them."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageFilter

from ldm.data.scene_rendering import EMOJI_FONT

needs_font = pytest.mark.skipif(
    not EMOJI_FONT.is_file(), reason="needs the emoji font: apt-get install fonts-noto-color-emoji"
)


def degraded(image: Image.Image, seed: int, blur: float = 0.6, noise: float = 4.0) -> Image.Image:
    """Slightly blurred (pixels) and noisy (of 255), as generated pictures are."""
    blurred = np.asarray(image.filter(ImageFilter.GaussianBlur(blur)), dtype=float)
    noisy = blurred + np.random.default_rng(seed).normal(0, noise, blurred.shape)
    return Image.fromarray(noisy.clip(0, 255).round().astype(np.uint8))

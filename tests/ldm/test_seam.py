"""The seam's figure against known answers."""

from __future__ import annotations

import math

import numpy as np
import pytest
from PIL import Image

from ldm.errors import UserError
from ldm.evaluation.seam import seam_gradient


def square(size: int = 64, start: int = 16, end: int = 48) -> np.ndarray:
    mask = np.zeros((size, size), dtype=bool)
    mask[start:end, start:end] = True
    return mask


def test_a_brighter_square_on_a_flat_picture_is_its_step() -> None:
    mask = square()
    pixels = np.full((64, 64, 3), 100, dtype=np.uint8)
    pixels[mask] = (130, 100, 70)  # a mean of 20 over the channels
    figure = seam_gradient(Image.fromarray(pixels), mask)
    assert (figure.seam, figure.image, figure.percentile_95, figure.ratio) == (20.0, 0.0, 0.0, math.inf)


def test_a_flat_picture_has_no_seam() -> None:
    figure = seam_gradient(Image.new("RGB", (64, 64), "blue"), square())
    assert (figure.seam, figure.image, figure.ratio) == (0.0, 0.0, 1.0)


def test_every_number_by_hand() -> None:
    pixels = np.repeat(np.array([[0, 10, 40], [0, 20, 60]], dtype=np.uint8)[..., None], 3, axis=2)
    mask = np.array([[0, 0, 1], [0, 0, 1]], dtype=bool)
    figure = seam_gradient(Image.fromarray(pixels), mask)
    assert figure.seam == (30 + 40) / 2
    assert figure.image == (10 + 20 + 0 + 10 + 20) / 5  # two pairs across, three down
    assert figure.percentile_95 == 20
    assert figure.ratio == 35 / 12


@pytest.mark.parametrize("scale", [255, 40])
def test_a_paste_of_the_same_kind_has_ratio_one_on_noise(scale: int) -> None:
    rng = np.random.default_rng(0)
    old, new = rng.integers(0, scale + 1, (2, 256, 256, 3), dtype=np.uint8)
    mask = square(256, 40, 200)
    figure = seam_gradient(Image.fromarray(np.where(mask[..., None], new, old)), mask)
    values = scale + 1
    assert figure.image == pytest.approx((values**2 - 1) / (3 * values), rel=0.02)  # E|a - b|, a and b uniform
    assert figure.ratio == pytest.approx(1, abs=0.05)
    assert figure.percentile_95 > figure.image


def test_a_brighter_paste_on_noise_stands_out() -> None:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 40, (256, 256, 3), dtype=np.uint8)
    mask = square(256, 40, 200)
    pixels[mask] += 200
    figure = seam_gradient(Image.fromarray(pixels), mask)
    assert figure.ratio > 10 and figure.seam == pytest.approx(200, abs=2)


def test_the_border_is_where_the_mask_leaves_zero() -> None:
    pixels = np.zeros((8, 8, 3), dtype=np.uint8)
    pixels[:, 4:] = 50
    soft = np.zeros((8, 8), dtype=np.float32)
    soft[:, 4:] = 0.1
    assert seam_gradient(Image.fromarray(pixels), soft).seam == 50


def test_a_mask_without_a_border_is_refused() -> None:
    image = Image.new("RGB", (8, 8))
    for mask in (np.zeros((8, 8)), np.ones((8, 8)), np.indices((8, 8)).sum(axis=0) % 2 == 0):
        with pytest.raises(UserError, match=r"mask: .* allowed is a mask with a border"):
            seam_gradient(image, mask)
    with pytest.raises(UserError, match="mask: found 8 x 9"):
        seam_gradient(image, np.zeros((9, 8)))
    with pytest.raises(UserError, match="found mode L"):
        seam_gradient(image.convert("L"), np.zeros((8, 8)))

"""Where pixels end after crop, resize and flip; maps and masks follow the image."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from ldm.data.sample import Sample
from ldm.data.sources import DataConfig
from ldm.data.transforms import Geometry, apply_geometry, draw_geometry


def coordinates(width: int, height: int) -> Sample:
    """Red = column, green = row; the map's class says the same."""
    across, down = np.meshgrid(np.arange(width), np.arange(height))
    image = np.stack([across, down, np.zeros_like(across)], axis=2).astype(np.uint8)
    semantic = Image.fromarray((across + 10 * down).astype(np.uint8))
    return Sample(key="k", image=Image.fromarray(image), semantic=semantic, mask=semantic)


def columns(image: torch.Tensor) -> list[int]:
    return ((image[0, 0] + 1) * 127.5).round().int().tolist()


def rows(image: torch.Tensor) -> list[int]:
    return ((image[1, :, 0] + 1) * 127.5).round().int().tolist()


@pytest.mark.parametrize(
    ("geometry", "expected"),
    [
        (Geometry(), [3, 4, 5, 6, 7, 8, 9, 10]),
        (Geometry(across=0.0), [0, 1, 2, 3, 4, 5, 6, 7]),
        (Geometry(across=0.999), [6, 7, 8, 9, 10, 11, 12, 13]),
        (Geometry(across=0.999, flipped=True), [13, 12, 11, 10, 9, 8, 7, 6]),
    ],
)
def test_crop_across_without_resizing(geometry: Geometry, expected: list[int]) -> None:
    result = apply_geometry(coordinates(14, 8), (8, 8), geometry)
    assert result.image is not None and result.semantic is not None and result.mask is not None
    assert columns(result.image) == expected
    assert rows(result.image) == list(range(8))
    assert result.semantic[0].tolist() == expected
    assert (result.mask[0, 0] * 255).round().int().tolist() == expected


def test_crop_down_without_resizing() -> None:
    result = apply_geometry(coordinates(8, 11), (8, 8), Geometry(down=0.5))
    assert result.image is not None and result.semantic is not None
    assert rows(result.image) == list(range(2, 10))
    assert result.semantic[:, 0].tolist() == [10 * row for row in range(2, 10)]


@given(st.integers(8, 40), st.integers(8, 40), st.integers(8, 24), st.floats(0, 0.999), st.booleans())
def test_a_marked_region_ends_where_the_map_says(width: int, height: int, size: int, place: float, flip: bool) -> None:
    """The image's bright half and the map's class 1 are the same region, before and after."""
    region = np.zeros((height, width), dtype=np.uint8)
    region[:, : width // 2] = 1
    image = Image.fromarray(np.repeat(region[..., None] * 255, 3, axis=2))
    sample = Sample(key="k", image=image, semantic=Image.fromarray(region), mask=Image.fromarray(region * 255))
    result = apply_geometry(sample, (size, size), Geometry(place, place, flip))
    assert result.image is not None and result.semantic is not None and result.mask is not None
    assert result.image.shape == (3, size, size)
    assert result.semantic.shape == (size, size)
    assert result.mask.shape == (1, size, size)
    bright = result.image[0] > 0
    # Only the column that the edge passes through may be rounded either way.
    assert (bright != (result.semantic == 1)).any(dim=0).sum() <= 1
    assert (bright != (result.mask[0] > 0.5)).any(dim=0).sum() <= 1
    unflipped = apply_geometry(sample, (size, size), Geometry(place, place)).semantic
    assert unflipped is not None
    assert torch.equal(result.semantic, unflipped.flip(-1) if flip else unflipped)


def extents(marked: torch.Tensor) -> tuple[float, float]:
    """Width and height in pixels of the disc marked in [H, W]: the second moment is a quarter of the squared radius."""

    def diameter(shares: torch.Tensor) -> float:
        places = torch.arange(len(shares), dtype=torch.float64)
        shares = shares.double() / shares.sum()
        middle = (shares * places).sum()
        return float(4 * (shares * (places - middle) ** 2).sum().sqrt())

    return diameter(marked.sum(dim=0)), diameter(marked.sum(dim=1))


@settings(deadline=None)
@given(
    st.tuples(st.integers(40, 200), st.integers(40, 200)),
    st.sampled_from([(32, 64), (48, 56), (48, 48), (56, 48), (64, 32)]),
    st.booleans(),
)
@example((59, 50), (56, 48), False)
def test_a_circle_stays_a_circle(image_size: tuple[int, int], size: tuple[int, int], flip: bool) -> None:
    (width, height), short = image_size, min(image_size)
    across, down = np.meshgrid(np.arange(width) + 0.5 - width / 2, np.arange(height) + 0.5 - height / 2)
    radius = 0.2 * short  # so small that no crop cuts it
    smooth = (255 * np.clip(radius - np.hypot(across, down) + 0.5, 0, 1)).astype(np.uint8)
    image, semantic = Image.fromarray(np.repeat(smooth[..., None], 3, axis=2)), Image.fromarray(smooth // 128)
    sample = Sample(key="k", image=image, semantic=semantic, mask=Image.fromarray(smooth))
    result = apply_geometry(sample, size, Geometry(flipped=flip))
    assert result.image is not None and result.semantic is not None and result.mask is not None
    assert result.image.shape == (3, size[1], size[0])
    assert result.semantic.shape == result.mask.shape[1:] == (size[1], size[0])
    scale = max(size[0] / width, size[1] / height)
    expected = 2 * radius * scale
    bright = (result.image[0] + 1).clamp(min=0) / 2
    # A map keeps whole pixels of the image, which may have become larger, and so does a mask (Pillow's box filter).
    for marked, tolerance in ((bright, 1), (result.mask[0], 1 + scale), ((result.semantic == 1).float(), 1 + scale)):
        found = extents(marked)
        assert abs(found[0] - expected) < tolerance and abs(found[1] - expected) < tolerance


def test_rectangles_are_cut_where_the_geometry_says() -> None:
    wide = apply_geometry(coordinates(20, 8), (16, 8), Geometry(across=0.999))
    assert wide.image is not None
    assert columns(wide.image) == list(range(4, 20))
    tall = apply_geometry(coordinates(8, 20), (8, 16), Geometry(flipped=True))
    assert tall.image is not None
    assert (columns(tall.image), rows(tall.image)) == ([7, 6, 5, 4, 3, 2, 1, 0], list(range(2, 18)))


def test_semantic_maps_invent_no_class() -> None:
    random = np.random.default_rng(0).choice([0, 50, 255], (37, 53)).astype(np.uint8)
    result = apply_geometry(Sample(key="k", semantic=Image.fromarray(random)), (16, 16), Geometry(0.3, 0.7, True))
    assert result.semantic is not None
    assert result.semantic.dtype == torch.int64
    assert set(result.semantic.unique().tolist()) <= {0, 50, 255}
    assert result.image is None


def test_thin_strokes_stay_in_the_mask() -> None:
    stroke = np.zeros((64, 64), dtype=np.uint8)
    stroke[:, 17] = 255
    result = apply_geometry(Sample(key="k", mask=Image.fromarray(stroke)), (16, 16), Geometry())
    assert result.mask is not None
    expected = torch.zeros(16, 16)
    expected[:, 4] = 0.25
    torch.testing.assert_close(result.mask[0], expected, atol=1 / 255, rtol=0)


def test_reducing_averages_instead_of_skipping() -> None:
    checks = np.indices((96, 96)).sum(axis=0) % 2 * 255
    image = Image.fromarray(np.repeat(checks[..., None].astype(np.uint8), 3, axis=2))
    result = apply_geometry(Sample(key="k", image=image), (12, 12), Geometry())
    assert result.image is not None
    assert result.image.abs().max() < 0.02


def test_a_long_strip_needs_no_huge_intermediate() -> None:
    strip = Sample(key="k", image=Image.new("RGB", (60_000, 1), (255, 0, 0)))
    result = apply_geometry(strip, (512, 512), Geometry())  # 60,000 x 512 times 512 pixels would not fit anywhere
    assert result.image is not None
    assert result.image.shape == (3, 512, 512)
    assert result.image[0].min() == 1


def test_by_default_the_middle_is_cut() -> None:
    result = apply_geometry(coordinates(14, 8), (8, 8), Geometry())
    assert result.image is not None
    assert columns(result.image) == [3, 4, 5, 6, 7, 8, 9, 10]


def test_flips_and_crops_are_uniform_and_flips_ignore_the_crop_mode() -> None:
    random = DataConfig(resolution=8, crop="random", flip=True)
    centre = DataConfig(resolution=8, crop="center", flip=True)
    drawn = [draw_geometry(random, torch.Generator().manual_seed(seed)) for seed in range(2000)]
    again = [draw_geometry(centre, torch.Generator().manual_seed(seed)) for seed in range(2000)]
    assert [g.flipped for g in drawn] == [g.flipped for g in again]
    assert {(g.across, g.down) for g in again} == {(None, None)}
    assert 900 < sum(g.flipped for g in drawn) < 1100
    offsets = [columns(image)[0] for g in drawn[:700] if (image := transform_at(g)) is not None]
    counts = np.bincount(np.where([g.flipped for g in drawn[:700]], np.array(offsets) - 7, offsets), minlength=7)
    assert len(counts) == 7
    assert counts.min() > 60


def transform_at(geometry: Geometry) -> torch.Tensor | None:
    return apply_geometry(coordinates(14, 8), (8, 8), geometry).image


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"resolution": 4}, "resolution"),
        ({"max_bad_share": 1.5}, "max_bad_share"),
    ],
)
def test_config_checks_itself(options: dict, field: str) -> None:
    with pytest.raises(ValueError, match=rf"^{field}: found .*; allowed is .*; "):
        DataConfig(**options)


def test_flip_is_refused_where_captions_say_left() -> None:
    from ldm.data.scenes import ScenesConfig

    with pytest.raises(ValueError, match=r"^flip: found true"):
        DataConfig(source="scenes", flip=True, scenes=ScenesConfig(max_objects=2, relations=True))
    assert DataConfig(source="scenes", flip=True, scenes=ScenesConfig(max_objects=1)).flip

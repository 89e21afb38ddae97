"""Masks: values, sizes, determinism and coverage; the mask at latent size against closed forms; the grey hole."""

from __future__ import annotations

import math
from typing import Any, get_args

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from conditioning import masks as generators
from conditioning.class_file import UNKNOWN_CLASS
from conditioning.inpainting import (
    InpaintingConfig,
    MaskKind,
    draw_mask,
    mask_to_latents,
    masked_image,
)
from conditioning.masks import MaskSize, box_mask, full_mask, half_plane_mask, object_mask, stroke_mask
from ldm.data import sample

KINDS = get_args(MaskKind)
SIZES = get_args(MaskSize)
sides = st.integers(8, 600)
seeds = st.integers(0, 2**32)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def map_with_objects(height: int, width: int) -> Tensor:
    """Background 0, a box of class 3, a band of class 7, some unknown."""
    semantic = torch.zeros(height, width, dtype=torch.int64)
    semantic[height // 4 : height // 2, width // 4 : width // 2] = 3
    semantic[-(height // 5) :] = 7
    semantic[: max(1, height // 10)] = UNKNOWN_CLASS
    return semantic


def coverage(kind: MaskKind, draws: int, side: int = 64, **values: Any) -> Tensor:
    config = InpaintingConfig(masks=kind, full_mask=0, **values)
    generator = seeded(0)
    return torch.stack([draw_mask(config, side, side, generator).mean() for _ in range(draws)])


@settings(max_examples=150, deadline=None)
@given(kind=st.sampled_from(KINDS), height=sides, width=sides, seed=seeds, with_map=st.booleans())
@example(kind="strokes", height=8, width=600, seed=0, with_map=False)
@example(kind="boxes", height=600, width=8, seed=0, with_map=False)
def test_every_mask_has_the_size_and_both_values(
    kind: MaskKind, height: int, width: int, seed: int, with_map: bool
) -> None:
    semantic = map_with_objects(height, width) if with_map else None
    config = InpaintingConfig(masks=kind, full_mask=0)
    mask = draw_mask(config, height, width, seeded(seed), semantic)
    assert mask.shape == (1, height, width)
    assert mask.dtype == torch.float32
    assert mask.unique().tolist() == [0, 1]
    assert torch.equal(mask, draw_mask(config, height, width, seeded(seed), semantic))


@settings(max_examples=100, deadline=None)
@given(side=st.tuples(st.integers(3, 12), st.integers(3, 12)), seed=seeds, size=st.sampled_from(SIZES))
def test_the_smallest_masks_have_both_values_too(side: tuple[int, int], seed: int, size: MaskSize) -> None:
    for mask in (
        stroke_mask(*side, seeded(seed), size),
        box_mask(*side, seeded(seed), size),
        half_plane_mask(*side, seeded(seed)),
    ):
        assert mask.shape == (1, *side)
        assert mask.unique().tolist() == [0, 1]


def test_a_stroke_mask_that_would_cover_everything_is_drawn_again(monkeypatch: pytest.MonkeyPatch) -> None:
    wide = generators.Brush(1.0, strokes=(40, 40), length=(200, 200), width=(250, 250))
    monkeypatch.setitem(generators.BRUSHES, "large", wide)
    for seed in range(5):
        assert stroke_mask(32, 32, seeded(seed)).unique().tolist() == [0, 1]


def test_another_seed_is_another_mask() -> None:
    for kind in ("thin", "medium", "large", "strokes", "boxes", "half"):
        config = InpaintingConfig(masks=kind, full_mask=0)
        drawn = {draw_mask(config, 64, 64, seeded(seed)).numpy().tobytes() for seed in range(30)}
        assert len(drawn) > 25, kind


def test_successive_masks_of_one_generator_differ() -> None:
    generator = seeded(3)
    first, second = (draw_mask(InpaintingConfig(full_mask=0), 64, 64, generator) for _ in range(2))
    assert not torch.equal(first, second)


def test_thin_covers_less_than_medium_and_medium_less_than_large() -> None:
    """Measured at 64 px: 0.14, 0.22, 0.35; at 256 and 512 px the same to 0.005."""
    means = {}
    for kind, expected in (("thin", 0.14), ("medium", 0.22), ("large", 0.35)):
        shares = coverage(kind, 400)
        error = shares.std().item() / math.sqrt(400)
        means[kind] = (shares.mean().item(), error)
        assert shares.mean().item() == pytest.approx(expected, abs=5 * error)
    for less, more in (("thin", "medium"), ("medium", "large")):
        assert means[less][0] + 5 * means[less][1] < means[more][0] - 5 * means[more][1]


@pytest.mark.parametrize("kind", ["thin", "medium", "large"])
def test_coverage_does_not_depend_on_the_image_size(kind: MaskKind) -> None:
    small, large = coverage(kind, 150, 64), coverage(kind, 150, 256)
    # The same seed draws the same shapes at another scale.
    assert (small - large).abs().mean() < 0.02


def test_large_is_half_strokes_and_half_boxes() -> None:
    config, draws = InpaintingConfig(masks="large", full_mask=0), 600

    def is_boxes(mask: Tensor) -> bool:
        """Boxes leave the border free; no stroke of this size mask does for long, so a few are counted wrongly."""
        inside = mask[0, 1:-1, 1:-1]
        edges = (inside[1:, 1:] + inside[:-1, :-1] - inside[1:, :-1] - inside[:-1, 1:]).abs().sum()
        return edges.item() <= 4 * 4 * 4  # 4 boxes of 4 corners, and where their sides cross

    generator = seeded(1)
    boxes = sum(is_boxes(draw_mask(config, 128, 128, generator)) for _ in range(draws)) / draws
    assert boxes == pytest.approx(0.5, abs=5 * 0.5 / math.sqrt(draws))


@pytest.mark.parametrize("kind", KINDS)
def test_the_share_of_full_masks(kind: MaskKind) -> None:
    config, draws = InpaintingConfig(masks=kind, full_mask=0.25), 800
    generator = seeded(7)
    full = sum(bool(draw_mask(config, 16, 16, generator).all()) for _ in range(draws)) / draws
    assert full == pytest.approx(0.25, abs=4 * math.sqrt(0.25 * 0.75 / draws))


def test_always_full() -> None:
    assert draw_mask(InpaintingConfig(full_mask=1), 9, 30, seeded(0)).equal(full_mask(9, 30))
    assert full_mask(9, 30).equal(torch.ones(1, 9, 30))


def test_boxes_keep_lamas_margin() -> None:
    for seed in range(50):
        mask = box_mask(256, 256, seeded(seed))[0]
        assert not torch.cat([mask[:10], mask[-10:], mask[:, :10].T, mask[:, -10:].T]).any()
        rows, columns = mask.any(dim=1).sum(), mask.any(dim=0).sum()
        assert rows >= 30 and columns >= 30


def test_half_planes_are_convex_on_both_sides_and_often_upright() -> None:
    upright = 0
    for seed in range(200):
        mask = half_plane_mask(40, 64, seeded(seed))[0]
        for lines in (mask, mask.T):
            assert (lines.diff(dim=1).abs().sum(dim=1) <= 1).all()  # each line changes once at most
        upright += int((mask == mask[0]).all() or (mask == mask[:, :1]).all())
        assert 0.05 < mask.mean() < 0.95
    assert upright / 200 == pytest.approx(0.5, abs=0.15)


@settings(max_examples=50, deadline=None)
@given(seed=seeds, height=st.integers(20, 90), width=st.integers(20, 90))
def test_object_masks_cover_one_object_and_little_more(seed: int, height: int, width: int) -> None:
    semantic = map_with_objects(height, width)
    mask = object_mask(semantic, seeded(seed))
    assert mask is not None
    covered = [value for value in (3, 7) if mask[0][semantic == value].all()]
    assert covered  # the background and the unknown cover too much or are none
    grown = math.sqrt(height * width) * generators.MOST_GROWTH
    rows = mask[0].any(dim=1).sum()
    most = 2 * math.floor(grown + 1)  # whole pixels, rounded up
    assert any(rows <= (semantic == value).any(dim=1).sum() + most for value in covered)


def test_object_masks_find_every_object_and_follow_outline_or_box() -> None:
    semantic = torch.zeros(64, 64, dtype=torch.int64)
    for i in range(20):
        semantic[10 + i, 10 : 11 + i] = 4  # a triangle
    semantic[40:60, 40:60] = 9
    found: dict[int, set[bool]] = {4: set(), 9: set()}
    for seed in range(60):
        mask = object_mask(semantic, seeded(seed))
        assert mask is not None
        (value,) = [value for value in (4, 9) if mask[0][semantic == value].all()]
        box = mask[0].any(dim=1, keepdim=True) & mask[0].any(dim=0, keepdim=True)
        found[value].add(bool((mask[0].bool() == box).all()))
    assert found == {4: {True, False}, 9: {True}}  # the outline of a square is its box


@pytest.mark.parametrize(
    "semantic",
    [torch.zeros(20, 20), torch.full((20, 20), UNKNOWN_CLASS), torch.arange(400).view(20, 20) % 2 + UNKNOWN_CLASS - 1],
)
def test_without_an_object_there_are_boxes(semantic: Tensor) -> None:
    semantic = semantic.long()
    if (semantic == UNKNOWN_CLASS - 1).any():
        semantic[semantic == UNKNOWN_CLASS - 1] = UNKNOWN_CLASS
    config = InpaintingConfig(masks="objects", full_mask=0)
    assert object_mask(semantic, seeded(0)) is None
    assert draw_mask(config, 20, 20, seeded(1), semantic).unique().tolist() == [0, 1]


def test_an_object_is_grown_in_all_directions() -> None:
    dot = torch.zeros(21, 21, dtype=torch.bool)
    dot[10, 10] = True
    for radius in range(9):
        expected = torch.zeros(21, 21, dtype=torch.bool)
        expected[10 - radius : 11 + radius, 10 - radius : 11 + radius] = True
        assert (generators._grown(dot.numpy(), radius) == expected.numpy()).all()


def test_the_mixtures_use_objects_for_their_share_where_there_is_a_map() -> None:
    """Of one dot in a corner only object masks are so small."""
    semantic = torch.zeros(64, 64, dtype=torch.int64)
    semantic[:6, :6] = 1
    draws = 1000
    for share in (0.0, 0.3):
        config, generator = InpaintingConfig(masks="large", full_mask=0, object_share=share), seeded(0)
        masks = [draw_mask(config, 64, 64, generator, semantic) for _ in range(draws)]
        inside = sum(bool(mask[0, :6, :6].all()) and mask[0, 11:].sum() + mask[0, :, 11:].sum() == 0 for mask in masks)
        assert inside / draws == pytest.approx(share, abs=4 * math.sqrt(share * (1 - share) / draws))
    plain = InpaintingConfig(masks="strokes", full_mask=0, object_share=1.0)
    assert torch.equal(draw_mask(plain, 64, 64, seeded(2), semantic), draw_mask(plain, 64, 64, seeded(2)))


def test_user_errors() -> None:
    with pytest.raises(ValueError, match=r"semantic: found a map of 8 x 9; allowed is the mask's size, 9 x 8"):
        draw_mask(InpaintingConfig(), 9, 8, seeded(0), torch.zeros(8, 9, dtype=torch.int64))
    for draw in (stroke_mask, box_mask, half_plane_mask):
        with pytest.raises(ValueError, match="found 2 x 9 pixels; allowed is 3 or more"):
            draw(2, 9, seeded(0))
    with pytest.raises(ValueError, match=r"masks: found 'larg'; allowed is thin, medium, large"):
        InpaintingConfig(masks="larg")  # type: ignore[arg-type]
    for field in ("full_mask", "object_share", "dropout"):
        for value in (-0.1, 1.1, math.nan):
            with pytest.raises(ValueError, match=f"^{field}: found .*; allowed is 0 to 1"):
                InpaintingConfig(**{field: value})


def test_unknown_is_the_same_number_everywhere() -> None:
    assert sample.UNKNOWN_CLASS == UNKNOWN_CLASS


# --- at latent size ---


def shared(pixels: int, cells: int) -> Tensor:
    """Lengths that pixel i and cell j share, as float64 [cells, pixels]: the definition."""
    matrix = torch.zeros(cells, pixels, dtype=torch.float64)
    for cell in range(cells):
        for pixel in range(pixels):
            low, high = max(cell / cells, pixel / pixels), min((cell + 1) / cells, (pixel + 1) / pixels)
            matrix[cell, pixel] = max(0.0, high - low)
    return matrix


@settings(max_examples=60, deadline=None)
@given(
    size=st.tuples(st.integers(1, 50), st.integers(1, 50)),
    cells=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    seed=seeds,
    soft=st.booleans(),
)
def test_the_mask_at_latent_size_is_the_area_mean(
    size: tuple[int, int], cells: tuple[int, int], seed: int, soft: bool
) -> None:
    masks = torch.rand(2, 1, *size, generator=seeded(seed))
    masks = masks if soft else masks.round()
    rows, columns = shared(size[0], cells[0]), shared(size[1], cells[1])
    expected = rows @ masks.double() @ columns.T * (cells[0] * cells[1])
    torch.testing.assert_close(mask_to_latents(masks, *cells).double(), expected, rtol=0, atol=1e-6)


def test_whole_ratios_are_the_mean_of_blocks() -> None:
    masks = torch.rand(2, 1, 64, 48, generator=seeded(0)).round()
    expected = masks.view(2, 1, 8, 8, 6, 8).mean(dim=(3, 5))
    assert torch.equal(mask_to_latents(masks, 8, 6), expected)


@settings(max_examples=60, deadline=None)
@given(size=st.tuples(sides, sides), seed=seeds)
def test_full_stays_full_and_one_pixel_counts(size: tuple[int, int], seed: int) -> None:
    height, width = size
    cells = (math.ceil(height / 8), math.ceil(width / 8))
    assert torch.equal(mask_to_latents(torch.ones(1, 1, height, width), *cells), torch.ones(1, 1, *cells))
    y, x = (int(torch.randint(side, (), generator=seeded(seed + i))) for i, side in enumerate(size))
    mask = torch.zeros(1, 1, height, width)
    mask[..., y, x] = 1
    reduced = mask_to_latents(mask, *cells)
    assert reduced[0, 0, y * cells[0] // height, x * cells[1] // width] > 0
    assert reduced.double().sum().item() == pytest.approx(cells[0] * cells[1] / (height * width), rel=1e-5)


def test_the_type_is_kept() -> None:
    for dtype in (torch.float16, torch.float64):
        assert mask_to_latents(torch.ones(1, 1, 16, 16, dtype=dtype), 2, 2).dtype == dtype


def test_the_hole_is_grey_and_the_rest_untouched() -> None:
    images = torch.rand(3, 3, 20, 30, generator=seeded(0)) * 2 - 1
    masks = torch.rand(3, 1, 20, 30, generator=seeded(1))
    before = images.clone()
    masked = masked_image(images, masks)
    hole = (masks >= 0.5).expand_as(images)
    assert (masked[hole] == 0).all()
    assert torch.equal(masked[~hole], images[~hole])
    assert torch.equal(masked, images * (masks < 0.5))  # as Stable Diffusion has it
    assert torch.equal(images, before)
    assert not masked_image(images, torch.ones(3, 1, 20, 30)).any()

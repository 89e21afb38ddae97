"""Nothing outside the mask changes, whatever the options; inside, closed forms for growing, fading, filling, crops."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from ldm.canvas import Canvas, InpaintingOptions, extend, prepare_canvas
from ldm.errors import UserError
from ldm.mask_shaping import bounding_box, dilated, inward_ramp, mask_array, read_mask, resized_to_cover

OPTIONS = st.builds(
    InpaintingOptions,
    dilate=st.sampled_from([0, 0, 1, 3, 20]),
    feather=st.sampled_from([0, 0, 1, 4, 40]),
    crop_padding=st.sampled_from([None, 0, 1, 8, 100]),
    fill=st.sampled_from(["original", "blur", "grey", "noise"]),
)
SIDE = st.integers(1, 90)
MODEL_SIZE = st.sampled_from([(64, 64), (64, 32), (24, 40), (8, 8)])


def noise_picture(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def empty_mask(rng: np.random.Generator, width: int, height: int) -> np.ndarray:
    return np.zeros((height, width))


def full_mask(rng: np.random.Generator, width: int, height: int) -> np.ndarray:
    return np.ones((height, width))


def pixel_mask(rng: np.random.Generator, width: int, height: int) -> np.ndarray:
    mask = np.zeros((height, width))
    mask[rng.integers(height), rng.integers(width)] = 1
    return mask


def boxes_mask(rng: np.random.Generator, width: int, height: int) -> np.ndarray:
    """One to three boxes, far apart or not, at the border or not, hard or soft."""
    mask = np.zeros((height, width))
    for _ in range(rng.integers(1, 4)):
        top, left = rng.integers(height), rng.integers(width)
        mask[top : rng.integers(top, height) + 1, left : rng.integers(left, width) + 1] = rng.choice(
            [1.0, rng.random()]
        )
    return mask


def stroke_mask(rng: np.random.Generator, width: int, height: int) -> np.ndarray:
    mask = np.zeros((height, width))
    if rng.random() < 0.5:
        mask[rng.integers(height)] = 1
    else:
        mask[:, rng.integers(width)] = 1
    return mask


def speckled_mask(rng: np.random.Generator, width: int, height: int) -> np.ndarray:
    return rng.random((height, width)) * (rng.random((height, width)) < rng.random())


MASKS = st.sampled_from([empty_mask, full_mask, pixel_mask, boxes_mask, boxes_mask, stroke_mask, speckled_mask])


def as_l(mask: np.ndarray) -> Image.Image:
    return Image.fromarray(np.rint(mask * 255).astype(np.uint8))


def as_1(mask: np.ndarray) -> Image.Image:
    return Image.fromarray(mask >= 0.5)


FORMS: list[Callable[[np.ndarray], Any]] = [
    as_l,
    as_1,
    lambda mask: mask >= 0.5,
    lambda mask: np.rint(mask * 255).astype(np.uint8),
    lambda mask: mask.astype(np.float16),
    lambda mask: mask.astype(np.float32),
    lambda mask: mask,
]


def brute_dilated(mask: np.ndarray, radius: int) -> np.ndarray:
    """Growing by its definition."""
    height, width = mask.shape
    result = np.zeros_like(mask)
    for y in range(-min(radius, height - 1), min(radius, height - 1) + 1):
        for x in range(-min(radius, width - 1), min(radius, width - 1) + 1):
            if y**2 + x**2 <= radius**2:
                part = result[max(0, y) : height + min(0, y), max(0, x) : width + min(0, x)]
                moved = mask[max(0, -y) : height + min(0, -y), max(0, -x) : width + min(0, -x)]
                np.maximum(part, moved, out=part)
    return result


@settings(max_examples=400, deadline=None)
@given(
    seed=st.integers(0, 2**32), size=st.tuples(SIDE, SIDE), draw=MASKS, form=st.sampled_from(FORMS), options=OPTIONS,
    model_size=MODEL_SIZE,
)  # fmt: skip
def test_every_pixel_outside_the_mask_keeps_its_bytes(
    seed: int,
    size: tuple[int, int],
    draw: Callable[..., np.ndarray],
    form: Callable[[np.ndarray], Any],
    options: InpaintingOptions,
    model_size: tuple[int, int],
) -> None:
    rng = np.random.default_rng(seed)
    image, mask = noise_picture(rng, *size), form(draw(rng, *size))
    before = image.tobytes()
    canvas = prepare_canvas(image, mask, options, factor=8, model_size=model_size)
    assert canvas.image.mode == "RGB" and canvas.mask.dtype == np.float32
    assert canvas.image.width % 8 == canvas.image.height % 8 == 0
    assert canvas.mask.shape == (canvas.image.height, canvas.image.width)
    generated = noise_picture(rng, *canvas.image.size)
    result = canvas.compose(generated)
    assert image.tobytes() == before
    assert (result.mode, result.size) == ("RGB", size)
    hole = brute_dilated(mask_array(mask, size), options.dilate)
    assert np.array_equal(hole > 0, canvas.alpha > 0)
    old, new = np.asarray(image), np.asarray(result)
    assert np.array_equal(new[hole == 0], old[hole == 0])
    assert canvas.empty == (not hole.any())
    if options.crop_padding is None:
        made = np.asarray(generated)[: size[1], : size[0]]
        full = canvas.alpha == 1
        assert np.array_equal(new[full], made[full])
        low, high = np.minimum(old, made).astype(int), np.maximum(old, made).astype(int)
        assert (new >= low).all() and (new <= high).all()


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 2**32), size=st.tuples(SIDE, SIDE), draw=MASKS, options=OPTIONS, model_size=MODEL_SIZE)
def test_the_crop_holds_the_mask_and_is_no_larger_than_the_model(
    seed: int,
    size: tuple[int, int],
    draw: Callable[..., np.ndarray],
    options: InpaintingOptions,
    model_size: tuple[int, int],
) -> None:
    rng = np.random.default_rng(seed)
    canvas = prepare_canvas(noise_picture(rng, *size), draw(rng, *size), options, factor=8, model_size=model_size)
    left, top, right, bottom = canvas.box
    assert 0 <= left < right <= size[0] and 0 <= top < bottom <= size[1]
    changed = bounding_box(canvas.alpha)
    if changed is None or options.crop_padding is None:
        assert canvas.box == (0, 0, *size) and canvas.inner_size == size
        return
    assert left <= changed[0] and top <= changed[1] and right >= changed[2] and bottom >= changed[3]
    padding = options.crop_padding
    assert left <= max(0, changed[0] - padding) and right >= min(size[0], changed[2] + padding)
    assert canvas.image.width <= model_size[1] and canvas.image.height <= model_size[0]
    assert canvas.inner_size[0] == model_size[1] or canvas.inner_size[1] == model_size[0]
    assert canvas.mask.max() >= canvas.alpha.max() > 0


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    size=st.tuples(SIDE, SIDE),
    draw=MASKS,
    feather=st.integers(0, 20),
    padding=st.integers(0, 30),
)
def test_an_unchanged_crop_at_scale_one_stitches_to_the_picture_itself(
    seed: int, size: tuple[int, int], draw: Callable[..., np.ndarray], feather: int, padding: int
) -> None:
    rng = np.random.default_rng(seed)
    image, mask = noise_picture(rng, *size), draw(rng, *size)
    options = InpaintingOptions(feather=feather, crop_padding=padding)
    probe = prepare_canvas(image, mask, options, factor=1, model_size=(size[1], size[0]))
    box_size = (probe.box[2] - probe.box[0], probe.box[3] - probe.box[1])
    canvas = prepare_canvas(image, mask, options, factor=1, model_size=(box_size[1], box_size[0]))
    assume(canvas.box == probe.box)  # rounding may make it a pixel larger
    assert canvas.inner_size == box_size
    assert canvas.image.tobytes() == image.crop(canvas.box).tobytes()
    assert canvas.compose(canvas.image).tobytes() == image.tobytes()


def test_a_crop_of_the_models_size_is_the_pictures_own_pixels() -> None:
    image = noise_picture(np.random.default_rng(0), 200, 150)
    mask = np.zeros((150, 200), dtype=bool)
    mask[60:80, 90:110] = True
    canvas = prepare_canvas(image, mask, InpaintingOptions(crop_padding=22), factor=8, model_size=(64, 64))
    assert canvas.box == (68, 38, 132, 102)
    assert canvas.image.tobytes() == image.crop(canvas.box).tobytes()
    assert canvas.compose(canvas.image).tobytes() == image.tobytes()
    assert np.array_equal(canvas.mask, mask[38:102, 68:132])


@pytest.mark.parametrize(
    ("hole", "padding", "box", "size"),
    [
        ((90, 70, 110, 80), 0, (90, 65, 110, 85), (64, 64)),  # widened to the model's shape
        ((0, 0, 10, 30), 5, (0, 0, 35, 35), (64, 64)),  # at the border it is moved
        ((199, 149, 200, 150), 8, (191, 141, 200, 150), (64, 64)),
        ((100, 75, 101, 76), 0, (100, 75, 101, 76), (64, 64)),  # one pixel
        ((100, 0, 101, 150), 0, (26, 0, 176, 150), (64, 64)),  # one column
        ((0, 75, 200, 76), 0, (0, 0, 200, 150), (64, 48)),  # one row: the picture is not high enough
        ((50, 50, 60, 60), 1000, (0, 0, 200, 150), (64, 48)),
    ],
)
def test_the_box_of_a_crop(
    hole: tuple[int, int, int, int], padding: int, box: tuple[int, int, int, int], size: tuple[int, int]
) -> None:
    mask = Image.new("L", (200, 150))
    mask.paste(255, hole)
    image = Image.new("RGB", mask.size)
    canvas = prepare_canvas(image, mask, InpaintingOptions(crop_padding=padding), factor=8, model_size=(64, 64))
    assert (canvas.box, canvas.image.size) == (box, size)


def test_a_small_picture_is_enlarged_whole_and_padded() -> None:
    mask = np.ones((20, 33), dtype=bool)
    image = Image.new("RGB", (33, 20), (10, 20, 30))
    canvas = prepare_canvas(image, mask, InpaintingOptions(crop_padding=4), factor=8, model_size=(64, 96))
    assert (canvas.box, canvas.inner_size, canvas.image.size) == ((0, 0, 33, 20), (96, 58), (96, 64))
    result = canvas.compose(Image.new("RGB", (96, 64), (200, 100, 50)))
    assert set(result.getdata()) == {(200, 100, 50)}


def test_far_apart_regions_share_one_box() -> None:
    mask = np.zeros((100, 100), dtype=bool)
    mask[5, 5] = mask[94, 60] = True
    image = noise_picture(np.random.default_rng(0), 100, 100)
    canvas = prepare_canvas(image, mask, InpaintingOptions(crop_padding=2), factor=8, model_size=(64, 64))
    assert canvas.box == (0, 3, 94, 97)
    changed = np.asarray(canvas.compose(Image.new("RGB", (64, 64)))) != np.asarray(image)
    assert np.array_equal(changed.any(axis=2), mask)


def test_the_border_is_repeated_up_to_the_next_multiple() -> None:
    rng = np.random.default_rng(0)
    image, mask = noise_picture(rng, 13, 9), np.zeros((9, 13))
    mask[4:, 6:] = 0.5
    canvas = prepare_canvas(image, mask, factor=8)
    pixels = np.asarray(canvas.image)
    assert pixels.shape == (16, 16, 3)
    assert np.array_equal(pixels[:9, :13], np.asarray(image))
    assert (pixels[9:, :13] == pixels[8, :13]).all() and (pixels[:, 13:] == pixels[:, 12:13]).all()
    assert (canvas.mask[4:, 6:] == 0.5).all() and not canvas.mask[:4].any() and not canvas.mask[:, :6].any()


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), draw=MASKS, size=st.tuples(SIDE, SIDE))
def test_a_soft_mask_blends_by_the_formula(seed: int, draw: Callable[..., np.ndarray], size: tuple[int, int]) -> None:
    rng = np.random.default_rng(seed)
    image, mask = noise_picture(rng, *size), draw(rng, *size)
    canvas = prepare_canvas(image, mask, factor=1)
    generated = noise_picture(rng, *size)
    exact = mask[..., None] * np.asarray(generated, float) + (1 - mask[..., None]) * np.asarray(image, float)
    assert np.abs(np.asarray(canvas.compose(generated)) - exact).max() <= 0.5 + 1e-4


def test_an_empty_mask_gives_the_picture_back() -> None:
    image = noise_picture(np.random.default_rng(0), 20, 30)
    for options in (InpaintingOptions(dilate=5, feather=3, crop_padding=2), InpaintingOptions(fill="blur")):
        canvas = prepare_canvas(image, Image.new("L", image.size), options)
        assert canvas.empty
        result = canvas.compose(Image.new("RGB", canvas.image.size, "red"))
        assert result.tobytes() == image.tobytes() and result is not image


# Growing and fading


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    size=st.tuples(st.integers(1, 30), st.integers(1, 30)),
    radius=st.integers(0, 40),
    draw=MASKS,
)
def test_growing_is_its_definition(
    seed: int, size: tuple[int, int], radius: int, draw: Callable[..., np.ndarray]
) -> None:
    mask = draw(np.random.default_rng(seed), *size).astype(np.float32)
    assert np.array_equal(dilated(mask, radius), brute_dilated(mask, radius))


def test_a_pixel_grows_to_a_disc() -> None:
    mask = np.zeros((21, 21), dtype=np.float32)
    mask[10, 10] = 0.7
    rows, columns = np.indices(mask.shape) - 10
    assert np.array_equal(dilated(mask, 6) > 0, rows**2 + columns**2 <= 36)
    assert set(np.unique(dilated(mask, 6)).tolist()) == {0.0, mask.max().item()}


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    feather=st.integers(1, 60),
    draw=MASKS,
)
def test_fading_stays_inside_and_reaches_one_in_every_region(
    seed: int, size: tuple[int, int], feather: int, draw: Callable[..., np.ndarray]
) -> None:
    mask = draw(np.random.default_rng(seed), *size).astype(np.float32)
    ramp = inward_ramp(mask, feather)
    assert np.array_equal(ramp > 0, mask > 0)
    assert ramp.max() == (1 if mask.any() else 0)
    kept = np.argwhere(mask == 0)
    for y, x in np.argwhere(mask > 0)[::37]:
        squares = (kept[:, 0] - y) ** 2 + (kept[:, 1] - x) ** 2
        distance = min(math.sqrt(squares.min()), feather + 1) if len(kept) else feather + 1
        assert ramp[y, x] >= np.float32(distance / (feather + 1)) - 1e-6  # never fainter than the plain ramp
        if distance == feather + 1:
            assert ramp[y, x] == 1


def test_a_thick_region_fades_by_the_plain_ramp_and_corners_are_no_exception() -> None:
    mask = np.zeros((60, 60), dtype=np.float32)
    mask[10:50, 10:50] = 1
    expected = np.minimum(np.arange(1, 21), 8) / 8
    ramp = inward_ramp(mask, 7)
    assert np.allclose(ramp[30, 10:30], expected) and np.allclose(ramp[10:30, 30], expected)
    assert np.allclose(np.diagonal(ramp)[10:30], expected)
    assert np.allclose(ramp, ramp[::-1]) and np.allclose(ramp, ramp.T)


def test_the_pictures_border_is_no_edge_of_the_mask() -> None:
    mask = np.zeros((30, 30), dtype=np.float32)
    mask[:, 15:] = 1
    ramp = inward_ramp(mask, 4)
    assert np.allclose(ramp, np.concatenate([np.zeros(15), np.minimum(np.arange(1, 16), 5) / 5])[None])
    assert (inward_ramp(np.ones((5, 5), dtype=np.float32), 50) == 1).all()


@pytest.mark.parametrize("width", [1, 2, 3, 6, 11])
@pytest.mark.parametrize("feather", [16, 64])
def test_the_middle_of_a_thin_stroke_is_repainted_whole(width: int, feather: int) -> None:
    mask = np.zeros((60, 100), dtype=np.float32)
    mask[20 : 20 + width, 5:95] = 1
    ramp = inward_ramp(mask, feather)
    half = (width + 1) // 2
    expected = np.minimum(np.arange(1, width + 1), np.arange(width, 0, -1)) / half
    assert np.allclose(ramp[20 : 20 + width, 50], expected)
    assert (ramp[20 + half - 1, 30:70] == 1).all()


def test_a_thin_stroke_beside_a_thick_region_does_not_fade_with_it() -> None:
    mask = np.zeros((80, 80), dtype=np.float32)
    mask[:, :40] = 1
    mask[:, 42] = 1  # one pixel of the picture lies between
    ramp = inward_ramp(mask, 20)
    assert (ramp[:, 42] == 1).all()
    assert np.allclose(ramp[40, 39 - np.arange(21)], np.arange(1, 22) / 21)


def test_where_a_stroke_joins_a_thick_region_nothing_jumps() -> None:
    mask = np.zeros((101, 200), dtype=np.float32)
    mask[:, :80] = 1
    mask[49:52, 80:] = 1
    ramp = inward_ramp(mask, 20)[50]
    assert (ramp[:50] == 1).all() and (ramp[105:] == 1).all()
    assert 0 < ramp.min() < 0.2
    slope = np.abs(np.diff(ramp[80:]))
    assert slope[:12].max() < 0.05 and slope.max() < 0.5


# Filling


def hole_of(fill: str, image: Image.Image, mask: Any) -> np.ndarray:
    return np.asarray(prepare_canvas(image, mask, InpaintingOptions(fill=fill), factor=1).image)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    size=st.tuples(SIDE, SIDE),
    draw=MASKS,
    fill=st.sampled_from(["original", "noise", "grey", "blur"]),
)
def test_filling_changes_the_hole_only(
    seed: int, size: tuple[int, int], draw: Callable[..., np.ndarray], fill: str
) -> None:
    rng = np.random.default_rng(seed)
    image, mask = noise_picture(rng, *size), draw(rng, *size)
    old, filled = np.asarray(image), hole_of(fill, image, mask)
    assert np.array_equal(filled[mask == 0], old[mask == 0])
    if fill in ("original", "noise"):
        assert np.array_equal(filled, old)
    if fill == "grey":
        assert (filled[mask == 1] == 128).all()
    if fill == "blur" and (mask == 0).any():
        for channel in range(3):
            known = old[..., channel][mask < 1]
            found = filled[..., channel][mask == 1]
            assert not found.size or (found.min() >= known.min() and found.max() <= known.max())


def test_blur_continues_what_is_around_the_hole() -> None:
    ramp = np.linspace(20, 220, 96).round().astype(np.uint8)
    image = Image.fromarray(np.broadcast_to(ramp[None, :, None], (64, 96, 3)).copy())
    damaged, mask = np.array(image), np.zeros((64, 96), dtype=bool)
    mask[16:48, 32:64] = True
    damaged[mask] = (255, 0, 0)
    filled = hole_of("blur", Image.fromarray(damaged), mask)
    assert np.abs(filled.astype(int) - np.asarray(image).astype(int)).max() < 30
    flat = Image.new("RGB", (50, 50), (7, 99, 201))
    assert (hole_of("blur", flat, mask[:50, :50]) == (7, 99, 201)).all()
    assert (hole_of("blur", flat, np.ones((50, 50))) == 128).all()


def test_the_canvas_says_when_the_pipeline_is_to_fill() -> None:
    image = Image.new("RGB", (8, 8))
    assert prepare_canvas(image, np.ones((8, 8)), InpaintingOptions(fill="noise")).fill == "noise"


# The model's mask


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    size=st.tuples(SIDE, SIDE),
    other=st.tuples(SIDE, SIDE),
    draw=MASKS,
)
def test_no_pixel_of_the_mask_is_lost_in_resizing(
    seed: int, size: tuple[int, int], other: tuple[int, int], draw: Callable[..., np.ndarray]
) -> None:
    mask = draw(np.random.default_rng(seed), *size)
    result = resized_to_cover(mask, other[1], other[0])
    assert result.shape == (other[1], other[0])
    for y, x in [(0, 0), (other[1] - 1, other[0] - 1), (other[1] // 2, other[0] // 3)]:
        rows = slice(y * size[1] // other[1], math.ceil((y + 1) * size[1] / other[1]))
        columns = slice(x * size[0] // other[0], math.ceil((x + 1) * size[0] / other[0]))
        assert result[y, x] == mask[rows, columns].max()
    assert result.max() == mask.max()
    assert set(np.unique(result)) <= set(np.unique(mask))


# Outpainting


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    amounts=st.tuples(*[st.integers(0, 30)] * 4).filter(any),
    options=OPTIONS,
)
def test_extending_keeps_the_old_part(
    seed: int, size: tuple[int, int], amounts: tuple[int, int, int, int], options: InpaintingOptions
) -> None:
    left, top, right, bottom = amounts
    rng = np.random.default_rng(seed)
    image = noise_picture(rng, *size)
    wider, mask = extend(image, *amounts)
    assert wider.size == mask.size == (size[0] + left + right, size[1] + top + bottom)
    old = (left, top, left + size[0], top + size[1])
    assert wider.crop(old).tobytes() == image.tobytes()
    expected = np.full((mask.height, mask.width), 255)
    expected[top : top + size[1], left : left + size[0]] = 0
    assert mask.mode == "L" and np.array_equal(np.asarray(mask), expected)
    assert wider.getpixel((0, 0)) == image.getpixel((0, 0))
    assert wider.getpixel((wider.width - 1, wider.height - 1)) == image.getpixel((size[0] - 1, size[1] - 1))
    if options.dilate == 0:
        canvas = prepare_canvas(wider, mask, options, factor=8, model_size=(32, 32))
        result = canvas.compose(noise_picture(rng, *canvas.image.size))
        assert result.crop(old).tobytes() == image.tobytes()


@pytest.mark.parametrize("amounts", [(0, 0, 0, 0), (-1, 5, 0, 0), (0, 0, 0, -3)])
def test_amounts_that_extend_nothing_are_refused(amounts: tuple[int, int, int, int]) -> None:
    with pytest.raises(UserError, match="pixels to add") as error:
        extend(Image.new("RGB", (5, 5)), *amounts)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="image: found a L picture of 5 x 5 pixels; allowed is RGB"):
        extend(Image.new("L", (5, 5)), 1)


# Reading masks


def test_masks_are_read_from_any_usual_file(tmp_path: Path) -> None:
    grey = np.array([[0, 255, 128], [255, 0, 1]], dtype=np.uint8)
    rgb = np.repeat(grey[..., None], 3, axis=2)
    white = np.dstack([np.full((2, 3, 3), 255, dtype=np.uint8), grey])
    red = np.dstack([np.where(grey[..., None] > 0, (200, 0, 0), (0, 0, 0)).astype(np.uint8), grey])
    opaque = np.dstack([rgb, np.full_like(grey, 255)])
    black = np.dstack([np.zeros((2, 3, 3), dtype=np.uint8), grey])
    for number, pixels in enumerate([grey, rgb, white, red, opaque, black]):
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
        mask = read_mask(tmp_path / f"{number}.png")
        assert mask.mode == "L" and np.array_equal(np.asarray(mask), grey), number
    Image.fromarray(grey > 100).save(tmp_path / "one.png")
    assert np.array_equal(np.asarray(read_mask(tmp_path / "one.png")), np.where(grey > 100, 255, 0))


def test_what_is_transparent_is_kept_where_the_colours_differ(tmp_path: Path) -> None:
    pixels = np.array([[[255, 255, 255, 255], [255, 255, 255, 0], [0, 0, 0, 255]]], dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "m.png")
    assert np.asarray(read_mask(tmp_path / "m.png")).tolist() == [[255, 0, 0]]
    nothing = np.zeros((1, 3, 4), dtype=np.uint8)
    Image.fromarray(nothing).save(tmp_path / "n.png")
    assert np.asarray(read_mask(tmp_path / "n.png")).tolist() == [[0, 0, 0]]


def test_a_file_that_is_no_picture_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "m.png").write_text("no picture")
    for name in ("m.png", "missing.png"):
        with pytest.raises(UserError, match=f"{name}: ") as error:
            read_mask(tmp_path / name)
        assert "\n" not in str(error.value)


# What is refused


@pytest.mark.parametrize(
    ("image", "mask", "words"),
    [
        (Image.new("RGB", (64, 48)), Image.new("L", (48, 64)), " 48 x 64 pixels for an image of 64 x 48"),
        (Image.new("RGBA", (4, 4)), Image.new("L", (4, 4)), "RGBA"),
        (Image.new("RGB", (0, 4)), np.zeros((4, 0)), "0 x 4"),
        (Image.new("RGB", (4, 4)), Image.new("RGBA", (4, 4)), "RGBA"),
        (Image.new("RGB", (4, 4)), np.zeros((1, 4, 4)), r"shape \[1, 4, 4\]"),
        (Image.new("RGB", (4, 4)), np.full((4, 4), 1.5), "1.5"),
        (Image.new("RGB", (4, 4)), np.full((4, 4), -0.5), "-0.5"),
        (Image.new("RGB", (4, 4)), np.full((4, 4), math.nan), "nan"),
        (Image.new("RGB", (4, 4)), np.ones((4, 4), dtype=np.int64), "int64"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(image: Image.Image, mask: Any, words: str) -> None:
    with pytest.raises(UserError, match=rf"found.*{words}.*; allowed is") as error:
        prepare_canvas(image, mask)
    assert "\n" not in str(error.value)


def test_a_model_size_that_is_no_multiple_is_refused() -> None:
    with pytest.raises(UserError, match="model size: found 64 x 60; allowed is multiples of 8"):
        prepare_canvas(
            Image.new("RGB", (9, 9)), np.ones((9, 9)), InpaintingOptions(crop_padding=0), model_size=(64, 60)
        )


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"dilate": -1}, "dilate"),
        ({"dilate": 1.5}, "dilate"),
        ({"dilate": None}, "dilate"),
        ({"feather": -2}, "feather"),
        ({"feather": True}, "feather"),
        ({"crop_padding": -1}, "crop_padding"),
        ({"fill": "black"}, "fill"),
    ],
)
def test_options_that_cannot_work_are_refused_by_their_name(values: dict[str, Any], field: str) -> None:
    with pytest.raises(ValueError, match=f"^{field}: found .*; allowed is .*; ") as error:
        InpaintingOptions(**values)
    assert "\n" not in str(error.value)


def test_a_picture_that_is_not_the_models_is_a_mistake_of_the_caller() -> None:
    canvas: Canvas = prepare_canvas(Image.new("RGB", (9, 9)), np.ones((9, 9)))
    for wrong in (Image.new("RGB", (9, 9)), Image.new("L", (16, 16))):
        with pytest.raises(ValueError, match="allowed is RGB of 16 x 16"):
            canvas.compose(wrong)

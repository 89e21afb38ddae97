from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageFont

from ldm.errors import UserError
from ldm.picture import CELL_WIDTH, GAP, MOST_LINES, grid, parameters_text, read_parameters, save_png, to_pil, wrap

FONT = ImageFont.load_default(14)


def picture(colour: tuple[int, int, int], size: tuple[int, int] = (32, 32)) -> Image.Image:
    return Image.new("RGB", size, colour)


def test_bytes_are_those_of_diffusers() -> None:
    images = torch.randn(3, 3, 16, 24, generator=torch.Generator().manual_seed(0))
    images[0, 0, 0, :4] = torch.tensor([-1.0, 1.0, 0.0, 1 / 255])
    expected = VaeImageProcessor().postprocess(images, output_type="pil")
    for ours, theirs in zip(to_pil(images), expected, strict=True):
        assert ours.mode == "RGB" and ours.size == (24, 16)
        assert np.array_equal(np.asarray(ours), np.asarray(theirs))
    assert np.asarray(to_pil(images)[0])[0, :2, 0].tolist() == [0, 255]


def test_small_pictures_are_enlarged_by_a_whole_factor_without_smoothing() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    result = np.asarray(grid([Image.fromarray(pixels)]))
    assert result.shape == (160 + 2 * GAP, 160 + 2 * GAP, 3)
    inside = result[GAP : GAP + 160, GAP : GAP + 160]
    assert np.array_equal(inside, pixels.repeat(5, axis=0).repeat(5, axis=1))


def test_pictures_stand_row_by_row() -> None:
    colours = [(200, 0, 0), (0, 200, 0), (0, 0, 200), (200, 200, 0), (0, 200, 200)]
    result = grid([picture(colour, (200, 100)) for colour in colours], columns=3)
    assert result.size == (3 * 208 + 8, 2 * 108 + 8)
    for i, colour in enumerate(colours):
        row, column = divmod(i, 3)
        assert result.getpixel((8 + column * 208 + 100, 8 + row * 108 + 50)) == colour
    assert result.getpixel((8 + 2 * 208 + 100, 8 + 108 + 50)) == (255, 255, 255)


def test_every_picture_has_its_own_caption_below_it_and_inside_its_column() -> None:
    captions = ["a red square on a light blue background", "", "x" * 200]
    result = np.asarray(grid([picture((250, 250, 250))] * 3, captions, columns=3).convert("L"))
    below = result[GAP + CELL_WIDTH :, :]
    dark = [(below[:, GAP + i * (160 + GAP) : GAP + i * (160 + GAP) + 160] < 128).sum() for i in range(3)]
    assert dark[0] > 200 and dark[1] == 0 and dark[2] > dark[0]
    gaps = [result[:, i * (160 + GAP) : i * (160 + GAP) + GAP - 1] for i in range(4)]
    assert all((gap > 128).all() for gap in gaps)


def test_a_grid_of_nothing_or_with_a_caption_too_few_is_refused() -> None:
    with pytest.raises(ValueError, match="found 0 images"):
        grid([])
    with pytest.raises(ValueError, match="found 2 images and 1 captions"):
        grid([picture((0, 0, 0))] * 2, ["one"])


@given(text=st.text(st.characters(codec="latin-1", exclude_categories=["C"]), max_size=300), width=st.integers(20, 400))
def test_wrapped_lines_fit_and_lose_nothing_but_the_end(text: str, width: int) -> None:
    lines = wrap(text, FONT, width).split("\n")
    assert len(lines) <= MOST_LINES
    assert all(FONT.getlength(line) <= width or len(line) <= 4 for line in lines)
    kept = "".join("".join(lines).split())
    whole = "".join(text.split())
    assert kept == whole or (len(lines) == MOST_LINES and kept.endswith("...") and whole.startswith(kept[:-3]))


def test_parameters_are_written_as_the_web_ui_does() -> None:
    options = {"steps": 20, "sampler": "DPM++ 2M", "seed": 1, "size": (64, 48), "model": "shapes"}
    assert parameters_text("a cat", "dog", guidance_scale=7.0, **options) == (  # type: ignore[arg-type]
        "a cat\nNegative prompt: dog\nSteps: 20, Sampler: DPM++ 2M, CFG scale: 7, Seed: 1, Size: 64x48, Model: shapes"
    )
    assert parameters_text("a cat", guidance_scale=2.5, **options).startswith(  # type: ignore[arg-type]
        "a cat\nSteps: 20, Sampler: DPM++ 2M, CFG scale: 2.5,"
    )


@pytest.mark.parametrize("text", ["a cat\nSteps: 20", "ein Hündchen, 猫, 🐱", ""])
def test_parameters_and_pixels_come_back_from_the_file(tmp_path: Path, text: str) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8))
    save_png(image, tmp_path / "a.png", text)
    assert read_parameters(tmp_path / "a.png") == text
    assert np.array_equal(np.asarray(Image.open(tmp_path / "a.png")), np.asarray(image))
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
    save_png(image, tmp_path / "a.png")
    assert read_parameters(tmp_path / "a.png") is None


def test_a_failed_write_leaves_the_old_file_and_no_rubbish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_png(picture((1, 2, 3)), tmp_path / "a.png", "old")

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(UserError, match=r"a\.png: cannot be written: No space left on device"):
        save_png(picture((4, 5, 6)), tmp_path / "a.png", "new")
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
    assert read_parameters(tmp_path / "a.png") == "old"


def test_a_missing_folder_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be written: No such file or directory"):
        save_png(picture((1, 2, 3)), tmp_path / "no" / "a.png")

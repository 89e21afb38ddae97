from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldm.picture import read_parameters
from ldm.pipeline import LatentDiffusionPipeline

Command = Callable[..., str]


@pytest.fixture
def command(drawing_command: Command, tiny_folder: Path) -> Command:
    """`ldm img2img` on the tiny model."""
    return partial(drawing_command, "img2img", tiny_folder, steps=5)


def save_picture(path: Path, size: tuple[int, int] = (37, 24)) -> Image.Image:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    picture.save(path)
    return picture


def pixels(image: Path | Image.Image) -> np.ndarray:
    return np.asarray(Image.open(image) if isinstance(image, Path) else image).astype(int)


def test_variations_of_a_picture(command: Command, tmp_path: Path, tiny_pipeline: LatentDiffusionPipeline) -> None:
    picture = save_picture(tmp_path / "x.png")
    told = command(
        *("--image", "x.png", "--strength", "0.6", "--prompt", "a dog", "--count", "3", "--seed", "7"),
        *("--batch", "2", "--scheduler", "ddim", "--negative", "cat", "--guidance", "text=3"),
    )
    assert "9/9" in told  # 3 of 5 steps for 3 pictures
    expected = tiny_pipeline(
        ["a dog"] * 3,
        "cat",
        image=picture,
        strength=0.6,
        guidance_scale=3,
        num_inference_steps=5,
        scheduler="ddim",
        seed=7,
    ).images
    for number, image in enumerate(expected):
        found = tmp_path / "out" / f"0000{number}-{7 + number}.png"
        assert Image.open(found).size == (36, 24)  # the nearest that the model can draw
        assert np.abs(pixels(found) - pixels(image)).max() <= 1
    assert read_parameters(tmp_path / "out" / "00001-8.png") == (
        "a dog\nNegative prompt: cat\nSteps: 5, Sampler: DDIM, CFG scale: 3, Seed: 8, Size: 36x24, Model: shapes, "
        "Guidance: text=3, Image: x.png, Denoising strength: 0.6"
    )
    assert (tmp_path / "out" / "grid.png").is_file()


def test_less_strength_stays_nearer(command: Command, tmp_path: Path) -> None:
    picture = save_picture(tmp_path / "x.png", (32, 32))
    for strength in ("0.2", "0.6", "1"):
        command("--image", "x.png", "--strength", strength, "--seed", "7", "--size", "32")
    drawn = [pixels(tmp_path / "out" / f"0000{number}-7.png") for number in range(3)]
    low, middle, high = (np.abs(image - drawn[2]).mean() for image in drawn)
    assert low > middle > high == 0
    assert np.abs(drawn[0] - pixels(picture)).mean() > 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--image", "absent.png"), "--image: absent.png: no such file"),
        (("--image", "text.png"), "--image: text.png: it holds text, not an image"),
        (("--strength", "1.5"), "strength: found 1.5; allowed is above 0 up to 1"),
        (("--strength", "0.1"), "strength: found 0.1 with 5 steps, which leaves none"),
        (("--size", "31"), "height: found 31; allowed is a multiple of 2"),
        (("--count", "0"), "--count: found 0"),
        (("--semantic-map", "map.png"), "semantic_map: found a map; this model takes none"),
    ],
)
def test_bad_input_is_one_line(command: Command, tmp_path: Path, words: tuple[str, ...], message: str) -> None:
    save_picture(tmp_path / "x.png")
    (tmp_path / "text.png").write_text("not a picture")
    Image.new("L", (8, 8)).save(tmp_path / "map.png")
    assert message in command("--image", "x.png", *words, code=2)


def test_the_installed_command(tiny_folder: Path, tmp_path: Path) -> None:
    save_picture(tmp_path / "x.png")
    command = [sys.executable, "-m", "ldm.cli.main", "img2img", "--model", str(tiny_folder), "--image", "x.png"]
    done = subprocess.run(
        [*command, "--steps", "2", "--seed", "1", "--dtype", "fp32", "--device", "cpu", "--out", "out"],
        capture_output=True, text=True, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["out/00000-1.png", "out/grid.png"]

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldm.canvas import InpaintingOptions, extend
from ldm.cli.main import main
from ldm.picture import read_parameters
from ldm.pipeline import LatentDiffusionPipeline

SIZE = (37, 29)
"""(width, height): no multiple of the factor."""
Command = Callable[..., str]


@pytest.fixture
def plain(tiny_folder: Path) -> Path:
    """A model that knows no masks."""
    return tiny_folder


@pytest.fixture
def command(drawing_command: Command, conditioned_folder: Path) -> Command:
    """`ldm NAME WORDS` on the model that knows masks."""

    def call(name: str, *words: str, code: int = 0) -> str:
        return drawing_command(name, conditioned_folder, *words, code=code)

    return call


def save_picture(path: Path, size: tuple[int, int] = SIZE, seed: int = 0) -> np.ndarray:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return pixels


def save_mask(path: Path, size: tuple[int, int] = SIZE, box: tuple[int, int, int, int] = (9, 7, 22, 19)) -> np.ndarray:
    mask = Image.new("L", size)
    mask.paste(255, box)
    mask.save(path)
    return np.asarray(mask) > 0


def pixels_of(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(
    ("words", "options", "facts"),
    [
        ((), {}, "Denoising strength: 1"),
        (
            ("--dilate", "2", "--feather", "3", "--fill", "blur", "--strength", "0.5"),
            {"dilate": 2, "feather": 3, "fill": "blur"},
            "Mask dilation: 2, Mask blur: 3, Masked content: fill, Denoising strength: 0.5",
        ),
        (
            ("--only-masked", "--fill", "noise"),
            {"crop_padding": 32, "fill": "noise"},
            "Masked content: latent noise, Inpaint area: Only masked, Masked area padding: 32, Denoising strength: 1",
        ),
        (
            ("--only-masked", "3", "--size", "16x24"),
            {"crop_padding": 3},
            "Inpaint area: Only masked, Masked area padding: 3, Denoising strength: 1",
        ),
    ],
)
def test_the_file_is_what_the_pipeline_draws_and_keeps_every_byte_outside(
    command: Command,
    conditioned_pipeline: LatentDiffusionPipeline,
    tmp_path: Path,
    words: tuple[str, ...],
    options: dict[str, object],
    facts: str,
) -> None:
    before, mask = save_picture(tmp_path / "x.png"), save_mask(tmp_path / "k.png")
    told = command("inpaint", "--image", "x.png", "--mask", "k.png", "--prompt", "a dog", "--seed", "5", *words)
    assert told.count("inpainting by mask channels and latent blending") == 1
    after = pixels_of(tmp_path / "out" / "00000-5.png")
    assert after.shape == before.shape
    expected = conditioned_pipeline(
        "a dog",
        image=Image.fromarray(before),
        mask_image=Image.fromarray((mask * 255).astype(np.uint8)),
        inpainting=InpaintingOptions(**options),  # type: ignore[arg-type]
        strength=0.5 if "--strength" in words else 1.0,
        height=24 if "--size" in words else None,
        width=16 if "--size" in words else None,
        num_inference_steps=2,
        seed=5,
    ).images[0]
    assert np.array_equal(after, np.asarray(expected))
    if "--dilate" not in words:
        assert np.array_equal(after[~mask], before[~mask])
    rows, columns = np.nonzero((after != before).any(axis=2))
    assert rows.min() >= 5 and rows.max() < 21 and columns.min() >= 7 and columns.max() < 24  # the box and 2 pixels
    assert (after != before).any(axis=2)[mask].mean() > 0.9
    assert read_parameters(tmp_path / "out" / "00000-5.png") == (
        "a dog\nSteps: 2, Sampler: DPM++ 2M, CFG scale: 5, Seed: 5, Size: 37x29, Model: conditioned, "
        f"Image: x.png, Mask: k.png, {facts}"
    )
    assert names(tmp_path / "out") == ["00000-5.png", "grid.png"]


def test_a_model_without_masks_blends(command: Command, plain: Path, tmp_path: Path) -> None:
    before, mask = save_picture(tmp_path / "x.png"), save_mask(tmp_path / "k.png")
    told = command(
        "inpaint", "--model", str(plain), "--image", "x.png", "--mask", "k.png", "--count", "3", "--batch", "1",
        "--seed", "1",
    )  # fmt: skip
    assert told.count("inpainting by latent blending") == 1
    pictures = [pixels_of(tmp_path / "out" / f"0000{i}-{i + 1}.png") for i in range(3)]
    for after in pictures:
        assert np.array_equal(after[~mask], before[~mask])
    assert (pictures[0] != pictures[1]).any() and (pictures[1] != pictures[2]).any()


def test_a_map_of_the_picture(command: Command, tmp_path: Path) -> None:
    save_picture(tmp_path / "x.png"), save_mask(tmp_path / "k.png")
    words = ("inpaint", "--image", "x.png", "--mask", "k.png", "--seed", "1", "--only-masked", "3")
    pictures = []
    for number in (1, 2):
        Image.new("L", SIZE, number).save(tmp_path / f"{number}.png")
        command(*words, "--semantic-map", f"{number}.png")
        pictures.append(pixels_of(tmp_path / "out" / f"0000{number - 1}-1.png"))
    assert (pictures[0] != pictures[1]).any()


def test_a_folder_of_pairs_of_several_sizes(
    command: Command, conditioned_pipeline: LatentDiffusionPipeline, tmp_path: Path
) -> None:
    pairs = tmp_path / "pairs"
    pairs.mkdir()
    sizes = {"a": SIZE, "b": (20, 31), "c": SIZE}
    before = {name: save_picture(pairs / f"{name}.png", size, ord(name)) for name, size in sizes.items()}
    masks = {name: save_mask(pairs / f"{name}_mask.png", size, (4, 4, 15, 15)) for name, size in sizes.items()}
    Image.open(pairs / "b_mask.png").save(pairs / "b_mask.TIFF")
    (pairs / "b_mask.png").unlink()
    (pairs / "b.txt").write_text("a red\nhat\n", encoding="utf-8")
    (pairs / "notes.md").write_text("no picture")
    command("inpaint", "--folder", "pairs", "--prompt", "a dog", "--seed", "3")
    assert names(tmp_path / "out") == ["a.png", "b.png", "c.png"]
    for number, (name, prompt) in enumerate({"a": "a dog", "b": "a red hat", "c": "a dog"}.items()):
        after = pixels_of(tmp_path / "out" / f"{name}.png")
        assert np.array_equal(after[~masks[name]], before[name][~masks[name]])
        expected = conditioned_pipeline(
            prompt,
            image=Image.fromarray(before[name]),
            mask_image=Image.fromarray((masks[name] * 255).astype(np.uint8)),
            num_inference_steps=2,
            seed=3 + number,
        ).images[0]
        assert np.abs(after.astype(int) - np.asarray(expected).astype(int)).max() <= 1
        assert str(read_parameters(tmp_path / "out" / f"{name}.png")).startswith(f"{prompt}\nSteps: 2")
    assert main(["inpaint", "--model", "unused", "--folder", "pairs", "--out", "out"]) == 2  # nothing is overwritten


def test_a_folder_of_pairs_drawn_several_times(command: Command, tmp_path: Path) -> None:
    pairs = tmp_path / "pairs"
    pairs.mkdir()
    save_picture(pairs / "a.png"), save_mask(pairs / "a_mask.png")
    command("inpaint", "--folder", "pairs", "--count", "2", "--only-masked", "2")
    assert names(tmp_path / "out") == ["a-1.png", "a-2.png"]


PAIR = ("--image", "x.png", "--mask", "k.png")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "found no --image with --mask"),
        (("--image", "x.png"), "found no --image with --mask"),
        ((*PAIR, "--folder", "lonely"), "--folder: found beside --image or --mask"),
        (("--folder", "lonely"), "--folder lonely: found a.png without partner; allowed is pairs x.png, x_mask.png"),
        (("--folder", "lost"), "--folder lost: found b_mask.png without partner"),
        (("--folder", "double"), "found both a.jpg and a.png; allowed is one of a name"),
        (("--folder", "none"), "found no pictures; allowed is pairs"),
        (("--folder", "/no/folder"), "--folder: .*No such file or directory: /no/folder"),
        (("--folder", "uneven"), "uneven/a_mask.png: mask: found 37 x 28 pixels for an image of 37 x 29"),
        (("--folder", "good", "--out", "good"), "--out good: found the folder of the pictures itself"),
        (("--image", "text.png", "--mask", "k.png"), "--image: text.png: it holds text, not an image"),
        (("--image", "absent.png", "--mask", "k.png"), "--image: absent.png: no such file"),
        (("--image", "x.png", "--mask", "text.png"), "mask text.png: it holds text"),
        (("--image", "x.png", "--mask", "uneven/a_mask.png"), "found 37 x 28 pixels for an image of 37 x 29"),
        ((*PAIR, "--strength", "0"), "strength: found 0.0; allowed is above 0 up to 1"),
        ((*PAIR, "--strength", "0.1"), "strength: found 0.1 with 2 steps, which leaves none"),
        ((*PAIR, "--dilate", "-1"), "--dilate: found -1; allowed is 0 or more"),
        ((*PAIR, "--feather", "-1"), "--feather: found -1; allowed is 0 or more"),
        ((*PAIR, "--only-masked", "-1"), "--only-masked: found -1; allowed is 0 or more"),
        ((*PAIR, "--size", "32"), "--size: found without --only-masked"),
        ((*PAIR, "--only-masked", "--size", "33"), "height: found 33; allowed is a multiple of 2"),
        ((*PAIR, "--semantic-map", "small.png"), "semantic_map: found 8 x 8 pixels for a picture of 37 x 29"),
        ((*PAIR, "--count", "0"), "--count: found 0"),
    ],
)
def test_bad_input_is_one_line_before_anything_is_drawn(
    command: Command, tmp_path: Path, words: tuple[str, ...], message: str
) -> None:
    for folder in ("lonely", "lost", "double", "none", "uneven", "good"):
        (tmp_path / folder).mkdir()
    save_picture(tmp_path / "x.png"), save_mask(tmp_path / "k.png")
    for folder, height in (("good", 29), ("lost", 29), ("uneven", 28)):
        save_picture(tmp_path / folder / "a.png"), save_mask(tmp_path / folder / "a_mask.png", (37, height))
    save_mask(tmp_path / "lost" / "b_mask.png")
    save_picture(tmp_path / "lonely" / "a.png")
    save_picture(tmp_path / "double" / "a.png"), save_picture(tmp_path / "double" / "a.jpg")
    (tmp_path / "text.png").write_text("not a picture")
    Image.new("L", (8, 8)).save(tmp_path / "small.png")
    before = names(tmp_path / "good")
    assert re.search(message, command("inpaint", *words, code=2))
    assert names(tmp_path / "good") == before


def test_a_black_mask_is_told_and_changes_nothing(command: Command, tmp_path: Path) -> None:
    before = save_picture(tmp_path / "x.png")
    Image.new("L", SIZE).save(tmp_path / "k.png")
    told = command("inpaint", "--image", "x.png", "--mask", "k.png", "--seed", "1")
    assert "k.png: black all over, so nothing is repainted" in told
    assert np.array_equal(pixels_of(tmp_path / "out" / "00000-1.png"), before)


# --- outpainting


def test_outpainting_keeps_every_byte_of_the_old_part(
    command: Command, conditioned_pipeline: LatentDiffusionPipeline, tmp_path: Path
) -> None:
    before = save_picture(tmp_path / "x.png")
    sides = ("--left", "5", "--right", "7", "--bottom", "3")
    command("outpaint", "--image", "x.png", *sides, "--prompt", "a dog", "--seed", "2", "--feather", "2")
    after = pixels_of(tmp_path / "out" / "00000-2.png")
    assert after.shape == (29 + 3, 37 + 12, 3)
    assert np.array_equal(after[:29, 5:42], before)
    extended, mask = extend(Image.fromarray(before), 5, 0, 7, 3)
    options = InpaintingOptions(feather=2)
    expected = conditioned_pipeline(
        "a dog", image=extended, mask_image=mask, inpainting=options, num_inference_steps=2, seed=2
    ).images[0]
    assert np.array_equal(after, np.asarray(expected))
    assert str(read_parameters(tmp_path / "out" / "00000-2.png")).endswith(
        "Size: 49x32, Model: conditioned, Image: x.png, Outpainting left: 5, Outpainting right: 7, "
        "Outpainting bottom: 3, Mask blur: 2, Denoising strength: 1"
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "found 0 pixels to add on all four sides"),
        (("--top", "-1"), "--top: found -1; allowed is 0 or more"),
        (("--top", "4", "--image", "absent.png"), "--image: absent.png: no such file"),
    ],
)
def test_bad_outpainting(command: Command, tmp_path: Path, words: tuple[str, ...], message: str) -> None:
    save_picture(tmp_path / "x.png")
    assert message in command("outpaint", "--image", "x.png", *words, code=2)


@pytest.mark.parametrize("name", ["inpaint", "outpaint"])
def test_the_installed_commands(conditioned_folder: Path, tmp_path: Path, name: str) -> None:
    before, mask = save_picture(tmp_path / "x.png"), save_mask(tmp_path / "k.png")
    what = ["--mask", "k.png"] if name == "inpaint" else ["--top", "4"]
    command = [
        sys.executable,
        "-m",
        "ldm.cli.main",
        name,
        "--model",
        str(conditioned_folder),
        "--image",
        "x.png",
        "--steps",
        "2",
    ]
    done = subprocess.run(
        [*command, *what, "--steps", "2", "--seed", "1", "--dtype", "fp32", "--device", "cpu", "--out", "out"],
        capture_output=True, text=True, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["out/00000-1.png", "out/grid.png"]
    after = pixels_of(tmp_path / "out" / "00000-1.png")
    assert np.array_equal(after[~mask], before[~mask]) if name == "inpaint" else np.array_equal(after[4:], before)

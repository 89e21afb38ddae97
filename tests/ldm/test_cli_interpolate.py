from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.data.images import to_tensor
from ldm.noise import NoiseConfig
from ldm.picture import EXIF_DETAILS, EXIF_USER_COMMENT, read_parameters
from ldm.pipeline import LatentDiffusionPipeline
from ldm.pipeline_request import nearest_side

Command = Callable[..., str]
SEEDS = ("--seeds", "1", "2", "--prompt", "a dog")


@pytest.fixture
def command(drawing_command: Command, tiny_folder: Path) -> Command:
    """`ldm interpolate` on the tiny model."""
    return partial(drawing_command, "interpolate", tiny_folder, steps=4)


def pixels(image: Path | Image.Image) -> np.ndarray:
    return np.asarray(Image.open(image) if isinstance(image, Path) else image).astype(int)


def frames_in(tmp_path: Path) -> list[np.ndarray]:
    return [pixels(path) for path in sorted((tmp_path / "out" / "00000-interpolation").iterdir())]


def assert_way(frames: list[np.ndarray], points: list[np.ndarray], legs: int) -> None:
    """The points lie `legs` frames apart, exactly but for rounding; between them every frame is another picture."""
    assert len(frames) == legs * (len(points) - 1) + 1
    for number, point in enumerate(points):
        assert np.abs(frames[number * legs] - point).max() <= 1
    assert all(np.abs(a - b).mean() > 0.3 for a, b in pairwise(frames))


def test_between_prompts(command: Command, tmp_path: Path, tiny_pipeline: LatentDiffusionPipeline) -> None:
    prompts = ["a red dog", "a blue cat", "green"]
    words = [word for prompt in prompts for word in ("--prompt", prompt)]
    command(*words, "--seed", "5", "--frames", "3", "--format", "folder", "--batch", "2", "--negative", "grey")
    points = [pixels(tiny_pipeline(prompt, "grey", seed=5, num_inference_steps=4).images[0]) for prompt in prompts]
    assert_way(frames_in(tmp_path), points, 2)
    assert read_parameters(tmp_path / "out" / "00000-interpolation" / "0003.png") == (
        "a red dog -> a blue cat -> green\nNegative prompt: grey\nSteps: 4, Sampler: DPM++ 2M, CFG scale: 5, Seed: 5, "
        "Size: 32x32, Model: shapes, Frame: 1.5, Interpolation: prompts"
    )


def test_between_seeds(command: Command, tmp_path: Path, tiny_pipeline: LatentDiffusionPipeline) -> None:
    seeds = (3, 9, 1)
    command("--seeds", *map(str, seeds), "--prompt", "a dog", "--frames", "4", "--format", "folder", "--size", "24x32")
    call: dict[str, Any] = {"num_inference_steps": 4, "height": 32, "width": 24}
    points = [pixels(tiny_pipeline("a dog", seed=seed, **call).images[0]) for seed in seeds]
    assert_way(frames_in(tmp_path), points, 3)


@pytest.mark.parametrize("flow", [False, True])
def test_between_pictures(
    command: Command, tmp_path: Path, make_pipeline: Callable[..., LatentDiffusionPipeline], flow: bool
) -> None:
    config = NoiseConfig(schedule="flow", prediction="flow") if flow else NoiseConfig()
    pipeline = make_pipeline(config, "euler" if flow else "ddim")
    with torch.no_grad():  # a network that changes its mind wildly from step to step has no inverse
        pipeline.unet.conv_out.weight *= 0.1
        pipeline.unet.conv_out.bias *= 0.1
    pipeline.save_pretrained(tmp_path / "model")
    # Pictures that the autoencoder can give back: its own.
    pictures = pipeline(["a", "b"], seed=1, num_inference_steps=4).images
    for name, picture in zip("ab", pictures, strict=True):
        picture.save(tmp_path / f"{name}.png")
    command(
        *("--model", str(tmp_path / "model"), "--images", "a.png", "b.png", "--frames", "3", "--format", "folder"),
        *("--steps", "20"),
    )
    latents = pipeline.encode_images(torch.stack([to_tensor(picture) for picture in pictures]))
    ends = [pixels(Image.fromarray(p)) for p in to_pixels(pipeline, latents)]
    frames = frames_in(tmp_path)
    for frame, end in ((frames[0], ends[0]), (frames[2], ends[1])):
        assert np.abs(frame - end).mean() < 1
    assert np.abs(frames[1] - ends[0]).mean() > 5 and np.abs(frames[1] - ends[1]).mean() > 5
    text = str(read_parameters(tmp_path / "out" / "00000-interpolation" / "0000.png"))
    assert f"Sampler: {'Euler' if flow else 'DDIM'}, CFG scale: 1, " in text
    assert text.endswith("Points: a.png -> b.png, Frame: 0, Interpolation: images")


def to_pixels(pipeline: LatentDiffusionPipeline, latents: torch.Tensor) -> np.ndarray:
    images = (pipeline.decode_latents(latents) / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
    return (images * 255).round().byte().numpy()


def test_conditions_stay_the_same_along_the_way(
    command: Command, conditioned_pipeline: LatentDiffusionPipeline, tmp_path: Path
) -> None:
    conditioned_pipeline.save_pretrained(tmp_path / "model")
    Image.new("L", (32, 32), 1).save(tmp_path / "map.png")
    words = ("--model", str(tmp_path / "model"), "--semantic-map", "map.png", "--label", "dog", "--frames", "2")
    command(*words, "--seeds", "3", "4", "--format", "folder")
    call: dict[str, Any] = {"semantic_map": torch.ones(32, 32).long(), "label": "dog", "num_inference_steps": 4}
    points = [pixels(conditioned_pipeline(seed=seed, **call).images[0]) for seed in (3, 4)]
    assert_way(frames_in(tmp_path), points, 1)
    Image.fromarray(points[0].astype(np.uint8)).save(tmp_path / "a.png")
    Image.fromarray(points[1].astype(np.uint8)).save(tmp_path / "b.png")
    command(*words, "--images", "a.png", "b.png", "--prompt", "a dog")  # inverted with them too
    assert pixels(tmp_path / "out" / "00001-interpolation.png").shape == (32, 64, 3)


def test_strip_folder_webp_and_gif_hold_the_same_frames(command: Command, tmp_path: Path) -> None:
    for kind in ("folder", "strip", "webp", "gif"):
        command(*SEEDS, "--frames", "3", "--format", kind, "--fps", "4")
    out = tmp_path / "out"
    frames = frames_in(tmp_path)
    assert np.array_equal(pixels(out / "00001-interpolation.png"), np.concatenate(frames, axis=1))
    text = str(read_parameters(out / "00001-interpolation.png"))
    assert text.startswith("a dog\nSteps: 4")
    assert text.endswith("Points: 1 2, Frame: 3 frames, Interpolation: seeds")
    for path, allowed in ((out / "00002-interpolation.webp", 0), (out / "00003-interpolation.gif", 12)):
        with Image.open(path) as animation:
            assert animation.n_frames == 3 and animation.info["loop"] == 0  # type: ignore[attr-defined]
            for number, frame in enumerate(frames):
                animation.seek(number)
                assert np.abs(pixels(animation.convert("RGB")) - frame).mean() <= allowed
                assert animation.info["duration"] == 250
            if path.suffix == ".gif":
                animation.seek(0)
                assert animation.info["comment"].decode() == text
            else:
                comment = animation.getexif().get_ifd(EXIF_DETAILS)[EXIF_USER_COMMENT]
                assert comment[:8] == b"UNICODE\0" and comment[8:].decode("utf-16-be") == text


def test_the_nearest_size() -> None:
    assert (nearest_side(3, 8), nearest_side(37, 8)) == (8, 40)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "found nothing to go between; allowed is one of --prompt A --prompt B"),
        (("--prompt", "a"), "found nothing to go between"),
        ((*SEEDS, "--prompt", "b"), "found seeds and prompts to go between"),
        ((*SEEDS, "--images", "a.png", "b.png"), "found images and seeds to go between"),
        (("--seeds", "1"), "--seeds: found 1; allowed is 2 or more"),
        (("--images", "a.png"), "--images: found 1; allowed is 2 or more"),
        ((*SEEDS, "--seed", "1"), "--seed: found beside --seeds"),
        ((*SEEDS, "--scheduler", "ddpm"), "scheduler: found ddpm, whose own noise makes"),
        ((*SEEDS, "--frames", "1"), "--frames: found 1; allowed is 2 or more"),
        ((*SEEDS, "--fps", "0"), "--fps: found 0; allowed is 1 to 50"),
        (("--seeds", "1", "-2"), "seed: found -2"),
        (("--images", "a.png", "b.png"), "found pictures of 16 x 8 and 8 x 8 pixels; allowed is one size"),
        (("--images", "a.png", "text.png"), "--images: text.png: it holds text"),
        (("--images", "a.png", "a.png", "--scheduler", "euler"), "--scheduler: found euler with --images"),
        (("--images", "a.png", "a.png", "--steps", "1"), "--steps: found 1; allowed is 2 or more"),
    ],
)
def test_bad_input_is_one_line(command: Command, tmp_path: Path, words: tuple[str, ...], message: str) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    Image.new("RGB", (16, 8)).save(tmp_path / "b.png")
    (tmp_path / "text.png").write_text("not a picture")
    assert message in command(*words, code=2)


def test_the_installed_command(tiny_folder: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "ldm.cli.main", "interpolate", "--model", str(tiny_folder), *SEEDS]
    done = subprocess.run(
        [*command, "--frames", "2", "--steps", "2", "--dtype", "fp32", "--device", "cpu", "--out", "out"],
        capture_output=True, text=True, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["out/00000-interpolation.png"]

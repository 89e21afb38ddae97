from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.cli.generate import add_arguments, read_prompts, run
from ldm.cli.options import SAMPLERS, parse_size
from ldm.cli.saving import next_number
from ldm.errors import UserError
from ldm.guidance import GuidanceOptions
from ldm.noise import NoiseConfig
from ldm.picture import colour_map, read_parameters
from ldm.pipeline import LatentDiffusionPipeline
from ldm.projected_guidance import ApgOptions
from ldm.sampling import SCHEDULERS

Generate = Callable[..., None]


def assert_same(found: Image.Image, expected: Image.Image) -> None:
    """Equal but for the rounding of another batch size."""
    assert np.abs(np.asarray(found).astype(int) - np.asarray(expected).astype(int)).max() <= 1


@pytest.fixture
def model(tiny_folder: Path) -> Path:
    return tiny_folder


@pytest.fixture
def generate(model: Path, tmp_path: Path, models_open_once: None) -> Generate:
    """`ldm generate` on the tiny model, writing to tmp_path/out."""

    def call(*words: str, out: Path = tmp_path / "out") -> None:
        parser = argparse.ArgumentParser()
        add_arguments(parser)
        defaults = ["--model", str(model), "--out", str(out), "--dtype", "fp32", "--device", "cpu", "--steps", "2"]
        run(parser.parse_args([*defaults, *words]))

    return call


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_pictures_grid_and_parameters(
    generate: Generate, tmp_path: Path, capsys: pytest.CaptureFixture[str], tiny_pipeline: LatentDiffusionPipeline
) -> None:
    generate(
        *("--prompt", "a red square", "--prompt", "a blue dog", "--negative", "green", "--count", "2", "--seed", "7"),
        *("--size", "24x16", "--guidance", "3", "--scheduler", "ddim", "--batch", "3"),
    )
    out = tmp_path / "out"
    pictures = ["00000-7.png", "00001-8.png", "00002-9.png", "00003-10.png"]
    assert names(out) == [*pictures, "grid.png"]
    assert read_parameters(out / "00002-9.png") == (
        "a blue dog\nNegative prompt: green\nSteps: 2, Sampler: DDIM, CFG scale: 3, Seed: 9, Size: 24x16, Model: shapes"
    )
    written = capsys.readouterr()
    assert written.out.split() == [str(out / name) for name in [*pictures, "grid.png"]]
    assert "8/8" in written.err  # 2 steps x 4 pictures
    alone = tiny_pipeline(
        "a blue dog", "green", seed=9, height=16, width=24, guidance_scale=3, scheduler="ddim", num_inference_steps=2
    ).images[0]
    difference = np.asarray(alone).astype(int) - np.asarray(Image.open(out / "00002-9.png")).astype(int)
    assert np.abs(difference).max() <= 1
    assert Image.open(out / "grid.png").width == 2 * (7 * 24) + 3 * 8  # two columns, enlarged sevenfold


def test_a_second_run_numbers_on(generate: Generate, tmp_path: Path) -> None:
    for _ in range(2):
        generate("--prompt", "a", "--seed", "3", "--scheduler", "heun")
    assert names(tmp_path / "out") == ["00000-3.png", "00001-3.png", "grid.png"]
    assert next_number(tmp_path / "out") == 2
    assert next_number(tmp_path / "absent") == 0


def test_prompts_come_from_the_command_line_and_then_from_the_file(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("  a dog \n\nein Hündchen\n", encoding="utf-8")
    assert read_prompts(["a cat"], file) == ["a cat", "a dog", "ein Hündchen"]
    file.write_text("\n")
    with pytest.raises(UserError, match="found no prompt; allowed is one a line"):
        read_prompts([], file)
    with pytest.raises(UserError, match=r"--prompts .*absent\.txt: .*No such file"):
        read_prompts([], tmp_path / "absent.txt")
    assert read_prompts([], None) == []


def test_sizes() -> None:
    assert parse_size(None) == (None, None)
    assert parse_size("512") == (512, 512)
    assert parse_size("640x384") == (384, 640)
    for wrong in ("big", "12x", "-4", "3x4x5"):
        with pytest.raises(UserError, match="--size: found"):
            parse_size(wrong)


def test_every_scheduler_has_a_name_for_the_file() -> None:
    assert set(SAMPLERS) == set(SCHEDULERS)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "/no/such/model"], "/no/such/model: no such folder"),
        (["--scheduler", "eular"], "did you mean euler"),
        (["--steps", "0"], "--steps: found 0"),
        (["--steps", "2000"], "num_inference_steps: found 2000; allowed is 1 to 1000"),
        (["--count", "0"], "--count: found 0"),
        (["--batch", "-1"], "--batch: found -1"),
        (["--size", "33"], "height: found 33; .* nearest are 32 and 34"),
        (["--guidance", "-2"], "guidance_scale: found -2"),
        (["--guidance", "txt=2"], "guidance_scale: found 'txt'; .* did you mean text"),
        (["--guidance", "semantic=2"], "guidance_scale: found semantic, a condition that is not given"),
        (["--guidance-interval", "0.8", "0.2"], "interval: found 0.8, 0.2"),
        (["--guidance-rescale", "2"], "rescale: found 2"),
        (["--variation-seed", "2"], "--variation-seed: found without --variation-strength"),
        (["--variation-strength", "2"], "--variation-strength: found 2.0; allowed is 0 to 1"),
        (["--variation-strength", "0.5", "--variation-seed", "-1"], "--variation-seed: seed: found -1"),
        (["--semantic-map", "/no/map.png"], "--semantic-map: /no/map.png: no such file"),
        (["--semantic-map", __file__], "--semantic-map: .* no picture of an allowed format"),
        (["--label", "cat"], "label: found one; this model takes none"),
        (["--seed", "-2"], "seed: found -2"),
        (["--dtype", "int8"], "dtype: found 'int8'; allowed is auto, fp32, bf16, fp16"),
        (["--device", "warp"], "device: found 'warp'"),
        (["--device", "cuda:99"], "device: found cuda:99"),
        (["--out", __file__], "found the file .*; allowed is a folder"),
        (["--out", f"{__file__}/below"], "found the file"),
    ],
)
def test_bad_options_are_one_line_and_nothing_is_written(
    generate: Generate, tmp_path: Path, words: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        generate("--prompt", "a", *words)
    assert names(tmp_path) == []


@pytest.fixture(scope="session")
def conditioned(conditioned_pipeline: LatentDiffusionPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("conditioned") / "model"
    conditioned_pipeline.save_pretrained(path)
    return path


def save_map(path: Path, highest: int = 2, dtype: type = np.uint8) -> np.ndarray:
    values: np.ndarray = np.random.default_rng(0).integers(0, 3, (32, 32)).astype(dtype)
    values[0, 0] = highest
    Image.fromarray(values).save(path)
    return values


def test_a_map_a_label_and_their_guidance_without_a_prompt(
    generate: Generate,
    conditioned: Path,
    conditioned_pipeline: LatentDiffusionPipeline,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    values = save_map(tmp_path / "map.png")
    generate(
        *("--model", str(conditioned), "--semantic-map", str(tmp_path / "map.png"), "--label", "dog", "--seed", "1"),
        *("--guidance", "label=3,semantic=2", "--guidance-interval", "0.2", "1", "--guidance-rescale", "0.7", "--apg"),
        "--verbose",
    )
    expected = conditioned_pipeline(
        semantic_map=torch.from_numpy(values).long(),
        label="dog",
        seed=1,
        num_inference_steps=2,
        guidance_scale={"label": 3, "semantic": 2},
        guidance=GuidanceOptions(interval=(0.2, 1), rescale=0.7, apg=ApgOptions()),
    ).images[0]
    file = tmp_path / "out" / "00000-1.png"
    assert_same(Image.open(file), expected)
    assert str(read_parameters(file)).endswith(
        'CFG scale: 1, Seed: 1, Size: 32x32, Model: model, Guidance: "label=3, semantic=2", '
        "Guidance interval: 0.2-1, CFG Rescale phi: 0.7, APG: eta 0 momentum -0.5, Semantic map: map.png, Label: dog"
    )
    cells = np.asarray(Image.open(tmp_path / "out" / "grid.png").convert("RGB"))
    shown = cells[8 : 8 + 160 : 5, 8 : 8 + 160 : 5][:32, :32]  # the map stands before the picture, enlarged five times
    assert np.array_equal(shown, np.asarray(colour_map(values)))
    told = capsys.readouterr().err
    assert told.count("guidance scales: semantic 2, label 3\n") == 1
    assert "evaluations of the network per step: 3 for noise levels of 0.2 to 1, 1 elsewhere" in told


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "found no prompt; give --prompt TEXT or --prompts FILE"),
        (("--label", "cats"), "label: label: found 'cats', nearest is 'cat'"),
        (("--label", "7"), r"label: found 7; allowed is 0 \(cat\) to 1 \(dog\)"),
        (("--semantic-map", "300.png"), "found class 300; allowed is 0 to 2, or 255"),
        (("--semantic-map", "map.png", "--size", "32x16"), "found 32 x 32 pixels for a picture of 32 x 16"),
        (("--prompt", "a", "--guidance", "inpainting=2"), "found inpainting, a condition that is not given"),
    ],
)
def test_conditions_that_the_model_cannot_take(
    generate: Generate,
    conditioned: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    words: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    save_map(tmp_path / "map.png")
    save_map(tmp_path / "300.png", 300, np.uint16)
    with pytest.raises(UserError, match=message):
        generate("--model", str(conditioned), *words)
    assert capsys.readouterr().err == ""  # not even a bar
    assert not (tmp_path / "out").exists()


def test_variations_are_neighbours_of_one_picture(
    generate: Generate, tmp_path: Path, tiny_pipeline: LatentDiffusionPipeline
) -> None:
    def drawn(strength: str, *words: str) -> list[np.ndarray]:
        out = tmp_path / strength
        variation = ("--variation-strength", strength, "--variation-seed", "50")
        generate("--prompt", "a", "--seed", "3", "--count", "3", *variation, *words, out=out)
        assert read_parameters(out / "00002-3.png") == (
            "a\nSteps: 2, Sampler: DPM++ 2M, CFG scale: 5, Seed: 3, Size: 32x32, Model: shapes, "
            f"Variation seed: 52, Variation seed strength: {strength}"
        )
        return [np.asarray(Image.open(out / f"0000{i}-3.png")).astype(int) for i in range(3)]

    def of_seeds(*seeds: int) -> list[np.ndarray]:
        images = tiny_pipeline(["a"] * len(seeds), seed=seeds, num_inference_steps=2).images
        return [np.asarray(image).astype(int) for image in images]

    base, *others = of_seeds(3, 50, 51, 52)
    for picture in drawn("0"):
        assert np.abs(picture - base).max() <= 1
    for picture, other in zip(drawn("1"), others, strict=True):
        assert np.abs(picture - other).max() <= 1
    near = drawn("0.2", "--batch", "2")
    distances = [np.abs(picture - base).mean() for picture in near]
    assert all(0.5 < distance < np.abs(others[0] - base).mean() / 2 for distance in distances)
    assert np.abs(near[0] - near[1]).mean() > 0.5


def test_strength_0_is_the_picture_of_the_seed_for_a_stochastic_scheduler_too(
    generate: Generate, tmp_path: Path, tiny_pipeline: LatentDiffusionPipeline
) -> None:
    generate("--prompt", "a", "--seed", "3", "--variation-strength", "0", "--scheduler", "ddpm", "--steps", "4")
    expected = tiny_pipeline("a", seed=3, scheduler="ddpm", num_inference_steps=4).images[0]
    assert_same(Image.open(tmp_path / "out" / "00000-3.png"), expected)


def test_a_model_without_text_needs_no_prompt(
    generate: Generate, make_pipeline: Callable[..., LatentDiffusionPipeline], tmp_path: Path
) -> None:
    make_pipeline(NoiseConfig(), text=False).save_pretrained(tmp_path / "model")
    generate("--model", str(tmp_path / "model"), "--seed", "1")
    assert names(tmp_path / "out") == ["00000-1.png", "grid.png"]


def test_a_prompt_that_is_cut_is_told_once(
    generate: Generate, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    prompt = "a very long prompt " * 5
    generate("--prompt", prompt, "--count", "3", "--batch", "1", "--seed", "1")
    assert capsys.readouterr().err.count("prompt longer than the text window of 16 tokens; cut off: ") == 1


def test_the_installed_command(model: Path, tmp_path: Path) -> None:
    """The real entry point: results on stdout, the bar on stderr, bad input gives one line and exit code 2."""
    command = [sys.executable, "-m", "ldm.cli.main", "generate", "--model", str(model), "--steps", "2", "--seed", "0"]
    good = subprocess.run(
        [*command, "--prompt", "a cat", "--out", str(tmp_path / "out"), "--dtype", "fp32", "--device", "cpu"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert good.returncode == 0, good.stderr
    assert good.stdout.splitlines()[-1] == str(tmp_path / "out" / "grid.png")
    assert "drawing" in good.stderr and "Loading" not in good.stderr and "should be kept" not in good.stderr
    bad = subprocess.run([*command, "--out", str(tmp_path / "no")], capture_output=True, text=True, check=False)
    assert bad.returncode == 2 and bad.stdout == "" and not (tmp_path / "no").exists()
    assert bad.stderr == "ldm generate: found no prompt; give --prompt TEXT or --prompts FILE\n"

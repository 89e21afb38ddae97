from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldm.cli.generate import SAMPLERS, add_arguments, next_number, parse_size, read_prompts, run
from ldm.errors import UserError
from ldm.picture import read_parameters
from ldm.pipeline import LatentDiffusionPipeline
from ldm.sampling import SCHEDULERS

Generate = Callable[..., None]


@pytest.fixture(scope="session")
def model(tiny_pipeline: LatentDiffusionPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("generate") / "shapes"
    tiny_pipeline.save_pretrained(path)
    return path


@pytest.fixture
def generate(model: Path, tmp_path: Path) -> Generate:
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
    assert "4/4" in written.err  # 2 steps x 2 batches
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
    with pytest.raises(UserError, match="give --prompt TEXT or --prompts FILE"):
        read_prompts([], None)


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

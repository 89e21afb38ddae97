"""`ldm data check` and `ldm data scenes`: what is printed, written and returned."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from ldm.cli import data
from ldm.data.folder import FolderSource
from ldm.errors import UserError


def call(*words: object) -> int | None:
    parser = argparse.ArgumentParser()
    data.add_arguments(parser)
    return data.run(parser.parse_args([str(word) for word in words]))


@pytest.fixture
def images(tmp_path: Path) -> Path:
    root = tmp_path / "images"
    root.mkdir()
    for index in range(5):
        Image.new("RGB", (70, 80)).save(root / f"{index}.png")
    return root


def test_all_usable(images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("check", images) == 0
    out, err = capsys.readouterr()
    assert out == f"{images}: 5 of 5 images can be used, 0 cannot; short sides 70 to 70 px (median 70)\n"
    assert "warning: no caption: 0.png, 1.png, 2.png and 2 more" in err
    assert "pixels: 100%" in err


def test_some_unusable(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (images / "bad.jpg").write_bytes(b"")
    (images / "worse.jpg").write_text("words")
    assert call("check", images, "--json", tmp_path / "report.json", "--workers", 1, "--min-side", 75) == 1
    out, err = capsys.readouterr()
    assert [line.split(":")[0] for line in out.splitlines()] == ["bad.jpg", "worse.jpg", str(images)]
    assert "5 of 7 images can be used, 2 cannot" in out
    assert "warning: short side below 75 px" in err
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["images"], report["usable"]) == (7, 5)
    assert report["unusable"][0] == {"name": "bad.jpg", "reason": "the file is empty"}
    assert len(report["warnings"]["no caption"]) == 5


def test_images_of_each_bucket(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (150, 80)).save(images / "wide.png")
    (images / "bad.jpg").write_bytes(b"")
    words = ["--buckets", "--resolution", 64, "--step", 8, "--json", tmp_path / "report.json"]
    assert call("check", images, *words) == 1
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("bucket ")]
    assert lines == [
        "bucket 48x80: 0 images",
        "bucket 56x72: 5 images",
        "bucket 64x64: 0 images",
        "bucket 72x56: 0 images",
        "bucket 80x48: 1 images",
    ]
    assert json.loads((tmp_path / "report.json").read_text())["buckets"]["56x72"] == 5
    with pytest.raises(UserError, match=r"^ldm data check --buckets: resolution: found 100 with buckets of step 64"):
        call("check", images, "--buckets", "--resolution", 100)


@pytest.mark.skipif(sys.platform != "linux", reason="needs file names of any bytes")
def test_names_that_are_no_text_are_shown_escaped(images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import os

    Path(os.fsdecode(os.fsencode(images) + b"/\xff.png")).touch()
    assert call("check", images) == 1
    assert "\\udcff.png: the file is empty" in capsys.readouterr().out


def test_user_errors(images: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        call("check", tmp_path / "none")
    with pytest.raises(UserError, match="--workers: found 0"):
        call("check", images, "--workers", 0)
    with pytest.raises(UserError, match="--json: no folder"):
        call("check", images, "--json", tmp_path / "no" / "report.json")
    with pytest.raises(SystemExit):
        call()


def test_scenes_become_a_folder_that_passes_the_check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "scenes"
    assert not call("scenes", out, "--count", 6, "--resolution", 32, "--seed", 5, "--max-objects", 2)
    assert f"data.root={out}" in capsys.readouterr().out
    source = FolderSource(out)
    assert len(source) == 6
    sample = source.read(0)
    assert sample.image is not None and sample.image.size == (32, 32)
    assert sample.semantic is not None
    assert sample.captions[0]
    assert call("check", out, "--min-side", 32) == 0
    with pytest.raises(UserError, match="not an empty folder"):
        call("scenes", out, "--count", 6)


def test_scenes_that_cannot_be(tmp_path: Path) -> None:
    for words in (("--max-objects", 9), ("--count", 0), ("--resolution", 4)):
        with pytest.raises(UserError) as caught:
            call("scenes", tmp_path / "out", *words)
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("word", "code"), [("images", 0), ("none", 2)])
def test_the_program(images: Path, word: str, code: int) -> None:
    command = [sys.executable, "-m", "ldm.cli.main", "data", "check", str(images.parent / word)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == code
    if code:
        assert (
            result.stderr
            == f"ldm data: {images.parent / word}: no such folder; give the folder that holds the images\n"
        )
    else:
        assert result.stdout.endswith("5 of 5 images can be used, 0 cannot; short sides 70 to 70 px (median 70)\n")

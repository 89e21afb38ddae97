"""`ldm data maps` through the program itself: success, strays, and folders that are not there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from conditioning.class_file import read_classes
from conditioning.semantic import read_map
from ldm.data.maps import convert_maps
from ldm.errors import UserError

COLOURS = np.array([(0, 0, 0), (255, 0, 0), (0, 128, 255), (224, 224, 192)], dtype=np.uint8)
VALUES = np.array([0, 1, 2, 255])
NAMES = ("one.png", "deep/er/two.bmp", "three.PNG")


def run(*words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ldm.cli.main", "data", "maps", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture
def classes(tmp_path: Path) -> Path:
    path = tmp_path / "classes.txt"
    path.write_text("# colour map\n0 background 0 0 0\n2 hot dog 0 128 255\n1 apple #ff0000\n255 edge 224 224 192\n")
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "colours"
    for seed, name in enumerate(NAMES):
        which = np.random.default_rng(seed).integers(4, size=(9, 14))
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(COLOURS[which]).save(root / name)
    (root / "notes.txt").write_text("no map")
    return root


def expected(seed: int) -> np.ndarray:
    return VALUES[np.random.default_rng(seed).integers(4, size=(9, 14))]


def listing(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def test_success(folder: Path, classes: Path, tmp_path: Path) -> None:
    out = tmp_path / "maps"
    result = run(folder, out, "--classes", classes)
    assert result.returncode == 0, result.stderr
    assert result.stdout == f'{out}: 3 index maps; name each in the column "semantic" of the metadata file\n'
    assert listing(out) == ["deep", "deep/er", "deep/er/two.png", "one.png", "three.png"]
    for seed, name in enumerate(("one.png", "deep/er/two.png", "three.png")):
        assert np.array_equal(read_map(out / name).numpy(), expected(seed))
        with Image.open(out / name) as image:
            assert image.mode == "P"
            colours = {int(value): colour for value, colour in zip(VALUES, COLOURS.tolist(), strict=True)}
            shown = np.array([[colours[value] for value in row] for row in expected(seed).tolist()])
            assert np.array_equal(np.asarray(image.convert("RGB")), shown)
    assert read_classes(classes) == ("background", "apple", "hot dog")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["classes.txt", "colours", "maps"]


def test_all_strays_of_all_files_and_nothing_written(folder: Path, classes: Path, tmp_path: Path) -> None:
    for name, colour, pixels in (("one.png", (254, 0, 0), 5), ("deep/er/two.bmp", (1, 2, 3), 1)):
        with Image.open(folder / name) as image:
            image.load()
        for x in range(pixels):
            image.putpixel((x, 0), colour)
        image.putpixel((0, 5), (0, 128, 254))
        image.save(folder / name)
    (folder / "broken.png").write_bytes(b"")
    before = listing(tmp_path)
    result = run(folder, tmp_path / "maps", "--classes", classes)
    assert result.returncode == 2
    assert result.stdout.splitlines() == [
        "broken.png: the file is empty",
        "deep/er/two.bmp: #0080fe on 1 pixel (nearest is #0080ff, class 2)",
        "deep/er/two.bmp: #010203 on 1 pixel (nearest is #000000, class 0)",
        "one.png: #fe0000 on 5 pixels (nearest is #ff0000, class 1)",
        "one.png: #0080fe on 1 pixel (nearest is #0080ff, class 2)",
    ]
    last = result.stderr.splitlines()[-1]
    assert last == (
        f"ldm data: {folder}: found 5 problems in 3 of 4 maps; allowed are the colours of {classes}; "
        "add classes to it, or mend the maps; nothing was written"
    )
    assert listing(tmp_path) == before


def test_a_missing_folder(classes: Path, tmp_path: Path) -> None:
    result = run(tmp_path / "none", tmp_path / "maps", "--classes", classes)
    assert result.returncode == 2
    assert result.stderr == (
        f"ldm data: {tmp_path / 'none'}: no such folder; give the folder that holds the colour-coded maps\n"
    )
    assert not (tmp_path / "maps").exists()


def test_other_slips(folder: Path, classes: Path, tmp_path: Path) -> None:
    out = tmp_path / "maps"

    def fails(says: str, source: Path = folder, target: Path = out, file: Path = classes) -> None:
        with pytest.raises(UserError, match=says) as caught:
            convert_maps(source, target, file, progress=False)
        assert "\n" not in str(caught.value)

    fails("--classes: .*No such file", file=tmp_path / "none.txt")
    (tmp_path / "bare.txt").write_text("background 0 0 0\napple\n")
    fails(re.escape("--classes: ") + ".*line 2: found 'apple' without a colour", file=tmp_path / "bare.txt")
    fails("it lies inside", target=folder / "maps")
    fails("not an empty folder", target=folder)
    fails("not an empty folder", target=classes)
    (tmp_path / "empty").mkdir()
    fails("found no picture in it", source=tmp_path / "empty")
    Image.new("RGB", (2, 2)).save(folder / "one.bmp")
    fails("found one.bmp and one.png, which would both be one.png; rename one")
    assert not out.exists()


def test_an_empty_folder_is_filled_and_palette_pictures_are_taken_by_their_colours(
    classes: Path, tmp_path: Path
) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "maps").mkdir()
    image = Image.fromarray(np.array([[7, 9]], dtype=np.uint8))
    table = [0] * 768
    table[21:24], table[27:30] = [0, 128, 255], [255, 0, 0]
    image.putpalette(table)
    image.save(tmp_path / "in" / "a.png")
    assert convert_maps(tmp_path / "in", tmp_path / "maps", classes, progress=False) == 1
    assert read_map(tmp_path / "maps" / "a.png").tolist() == [[2, 1]]

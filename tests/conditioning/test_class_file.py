"""Class files: what is written is read; every slip is named with its line. Colour-coded maps: exact, or named."""

from __future__ import annotations

import colorsys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from conditioning.class_file import (
    MOST_NAMED,
    Colour,
    StrayColoursError,
    index_map,
    read_classes,
    read_palette,
    recolour_map,
)

words = st.text(st.characters(codec="utf-8", categories=("L", "P", "S", "M")), min_size=1, max_size=8).filter(
    lambda word: not word.startswith("#")
)
names = st.lists(words, min_size=1, max_size=3).map(" ".join)
colours = st.tuples(*[st.integers(0, 255)] * 3)


def written(text: str, folder: Path) -> Path:
    path = folder / "classes.txt"
    path.write_text(text, encoding="utf-8")
    return path


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_round_trip(data: st.DataObject) -> None:
    classes = tuple(data.draw(st.lists(names, min_size=1, max_size=12, unique=True)))
    shades = data.draw(st.lists(colours, min_size=len(classes), max_size=len(classes), unique=True))
    numbered, coloured = data.draw(st.booleans()), data.draw(st.booleans())
    lines = []
    for index, (name, (red, green, blue)) in enumerate(zip(classes, shades, strict=True)):
        as_hex = data.draw(st.booleans())
        colour = f"#{red:02x}{green:02X}{blue:02x}" if as_hex else f"{red}\t{green} {blue}"
        lines.append(f"{f'{index} ' if numbered else ''}{name}{f'   {colour}' if coloured else ''}")
    if numbered:
        lines = data.draw(st.permutations(lines))
    for _ in range(data.draw(st.integers(0, 3))):
        noise = data.draw(st.sampled_from(["", "   ", "# a comment", "#ff0000", "  # 1 2 3"]))
        lines.insert(data.draw(st.integers(0, len(lines))), noise)
    with tempfile.TemporaryDirectory() as folder:
        path = written("\n".join(lines), Path(folder))
        assert read_classes(path) == classes
        if coloured:
            assert read_palette(path) == {shade: index for index, shade in enumerate(shades)}


def test_the_plain_form(tmp_path: Path) -> None:
    assert read_classes(written("background\nhot dog\n\ncat\n", tmp_path)) == ("background", "hot dog", "cat")
    assert read_classes(written("\ufeff0\r\n1\r\n", tmp_path)) == ("0", "1")  # names that are numbers, from Windows
    assert read_classes(written("room 1\nroom 2\ngate 7 8\n", tmp_path)) == ("room 1", "room 2", "gate 7 8")


def test_255_has_a_colour_but_is_no_class(tmp_path: Path) -> None:
    path = written("255 void 224 224 192\n1 sea #0000ff\n0 sky #88ccff\n", tmp_path)
    assert read_classes(path) == ("sky", "sea")
    assert read_palette(path) == {(0x88, 0xCC, 0xFF): 0, (0, 0, 255): 1, (224, 224, 192): 255}


def test_255_classes_are_allowed(tmp_path: Path) -> None:
    assert len(read_classes(written("\n".join(f"c{i}" for i in range(255)), tmp_path))) == 255
    assert len(read_classes(written("\n".join(f"{i} c{i}" for i in range(256)), tmp_path))) == 255  # and the unknown


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "found no class; a class file has one a line"),
        ("\n# only this\n", "found no class"),
        ("255 void\n", "found no class but 255"),
        ("sky\n\nsea\nsky\n", "line 4: found the name 'sky' of line 1 again"),
        ("0 sky\n0 sea\n", "line 2: found the index 0 of line 1 again"),
        ("sky #0000ff\nsea 0 0 255\n", "line 2: found the colour #0000ff of line 1 again"),
        ("0 sky\n# x\n2 sea\n", "line 3: found index 2, but none is 1; allowed are 0 to 1 without gaps"),
        ("1 sky\n2 sea\n", "line 1: found index 1, but none is 0"),
        ("0 sky\nsea\n", "line 2: found no index before 'sea', but one in line 1"),
        ("sky\n1 sea\n", "line 2: found index 1 before 'sea', but none in line 1"),
        ("sky #00f\n", "line 1: found '#00f' after the name; allowed there is a colour as #rrggbb"),
        ("sky # above\n", "line 1: found '#' after the name; .* comments on lines of their own"),
        ("sky 0 0 256\n", "line 1: found the colour 0 0 256; allowed is 0 to 255"),
        ("\n".join(f"c{i}" for i in range(256)), "line 256: found 256 classes; allowed are at most 255"),
        ("\n".join(f"{i} c{i}" for i in range(257)), "line 257: found class 256; allowed are at most 255 classes"),
        ("0 a\n1 b\n300 c\n", "line 3: found class 300; allowed are at most 255 classes, 0 to 254"),
    ],
)
def test_every_slip_is_named_with_its_line(tmp_path: Path, text: str, says: str) -> None:
    path = written(text, tmp_path)
    with pytest.raises(ValueError, match=says) as caught:
        read_classes(path)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_classes(tmp_path / "none.txt")
    path = tmp_path / "latin.txt"
    path.write_bytes(b"B\xe4ume\n")
    with pytest.raises(ValueError, match="found bytes that are not UTF-8 text"):
        read_classes(path)


def test_a_palette_needs_every_colour(tmp_path: Path) -> None:
    path = written("sky 1 2 3\nsea\n", tmp_path)
    assert read_classes(path) == ("sky", "sea")
    with pytest.raises(ValueError, match=r"line 2: found 'sea' without a colour; .*add #rrggbb"):
        read_palette(path)


# --- colour-coded maps ---


@settings(max_examples=60, deadline=None)
@given(shades=st.lists(colours, min_size=1, max_size=20, unique=True), seed=st.integers(0, 1000), data=st.data())
def test_maps_go_to_indices_and_back(shades: list[Colour], seed: int, data: st.DataObject) -> None:
    indices = data.draw(st.lists(st.integers(0, 255), min_size=len(shades), max_size=len(shades), unique=True))
    palette = dict(zip(shades, indices, strict=True))
    which = np.random.default_rng(seed).integers(len(shades), size=(7, 5))
    image = Image.fromarray(np.array(shades, dtype=np.uint8)[which])
    found = index_map(image, palette)
    assert found.dtype == np.uint8
    assert np.array_equal(found, np.array(indices)[which])
    back = recolour_map(found, palette)
    assert back.mode == "P"
    assert np.array_equal(np.asarray(back), found)
    assert np.array_equal(np.asarray(back.convert("RGB")), np.asarray(image))


def test_strays_are_named_with_pixels_and_nearest() -> None:
    palette = {(0, 0, 0): 0, (255, 0, 0): 1, (0, 0, 255): 2}
    pixels = np.zeros((4, 5, 3), dtype=np.uint8)
    pixels[0, :3] = (250, 5, 5)
    pixels[1, 0] = (10, 10, 200)
    with pytest.raises(StrayColoursError) as caught:
        index_map(Image.fromarray(pixels), palette)
    assert (
        "found 2 colours not in the palette: #fa0505 on 3 pixels (nearest is #ff0000, class 1), "
        "#0a0ac8 on 1 pixel (nearest is #0000ff, class 2); allowed are the palette's; " in str(caught.value)
    )
    assert [(stray.colour, stray.pixels, stray.nearest, stray.index) for stray in caught.value.strays] == [
        ((250, 5, 5), 3, (255, 0, 0), 1),
        ((10, 10, 200), 1, (0, 0, 255), 2),
    ]


@settings(max_examples=40, deadline=None)
@given(shades=st.lists(colours, min_size=1, max_size=9, unique=True), seed=st.integers(0, 1000))
def test_strays_are_counted_and_compared_by_brute_force(shades: list[Colour], seed: int) -> None:
    palette = {shade: index for index, shade in enumerate(shades)}
    pixels = np.random.default_rng(seed).integers(0, 256, size=(6, 4, 3)).astype(np.uint8)
    pixels[0] = shades[0]
    pixels[1] = pixels[2]
    strange = [tuple(map(int, pixel)) for pixel in pixels.reshape(-1, 3) if tuple(map(int, pixel)) not in palette]
    with pytest.raises(StrayColoursError) as caught:
        index_map(Image.fromarray(pixels), palette)
    strays = caught.value.strays
    assert {stray.colour: stray.pixels for stray in strays} == {colour: strange.count(colour) for colour in strange}
    assert [stray.pixels for stray in strays] == sorted((stray.pixels for stray in strays), reverse=True)
    for stray in strays:

        def distance(colour: Colour, stray_colour: Colour = stray.colour) -> int:
            return sum((a - b) ** 2 for a, b in zip(colour, stray_colour, strict=True))

        assert distance(stray.nearest) == min(map(distance, palette))
        assert palette[stray.nearest] == stray.index


def test_a_message_stays_readable_and_the_error_holds_all() -> None:
    pixels = np.array([[round(255 * part) for part in colorsys.hsv_to_rgb(i / 300, 1, 1)] for i in range(300)])
    with pytest.raises(StrayColoursError) as caught:
        index_map(Image.fromarray(pixels.astype(np.uint8)[None]), {(0, 0, 0): 0})
    unique = len({tuple(row) for row in pixels.tolist()})
    assert len(caught.value.strays) == unique
    assert str(caught.value).count("nearest") == MOST_NAMED
    assert f", and {unique - MOST_NAMED} more on " in str(caught.value)


def test_other_pictures_are_refused() -> None:
    with pytest.raises(ValueError, match="found a picture of mode L; allowed is RGB"):
        index_map(Image.new("L", (2, 2)), {(0, 0, 0): 0})
    with pytest.raises(ValueError, match="empty palette"):
        index_map(Image.new("RGB", (2, 2)), {})

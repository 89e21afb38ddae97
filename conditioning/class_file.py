"""Class files and colour-coded maps: the names, numbers and colours of the classes of semantic maps."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from conditioning.unknown import UNKNOWN_CLASS as UNKNOWN_CLASS

MOST_NAMED = 50
"""Stray colours that an error names (the most frequent ones first); `StrayColoursError.strays` holds all."""

Colour = tuple[int, int, int]
Palette = dict[Colour, int]
_HEX = re.compile(r"#[0-9a-fA-F]{6}")


def read_classes(path: str | Path) -> tuple[str, ...]:
    """The names of the classes 0 to K-1 in the text file `path`.

    One class a line: `name`, or `index name` in any order (then in every line, without gaps), optionally followed by
    its colour as `#rrggbb` or as `r g b` in 0 to 255. Names may hold spaces. Blank lines and lines that begin with #
    are skipped. `255 name colour` gives unknown pixels a colour; it is no class.

    Raises ValueError that names the line: a duplicate name, index or colour, a gap, an index in some lines only, a
    broken colour, more than 255 classes, no class. Raises OSError if the file cannot be read.
    """
    entries = _read(Path(path))
    return tuple(entry.name for entry in entries if entry.index != UNKNOWN_CLASS)


def read_palette(path: str | Path) -> Palette:
    """Colour (r, g, b) -> index for every class of the class file `path`, and for 255 if it has a line.

    Raises what `read_classes` raises, and ValueError if a class has no colour.
    """
    entries = _read(Path(path))
    for entry in entries:
        if entry.colour is None:
            raise ValueError(
                f"{path}, line {entry.line}: found {entry.name!r} without a colour; a palette needs one for every "
                "class; add #rrggbb or r g b at its end"
            )
    return {entry.colour: entry.index for entry in entries if entry.colour is not None}


@dataclass(frozen=True)
class Stray:
    """A colour of a map that the palette does not have."""

    colour: Colour
    pixels: int
    nearest: Colour
    """The palette's nearest colour (Euclidean distance in RGB)."""
    index: int
    """The class of `nearest`."""

    def __str__(self) -> str:
        return (
            f"{_hex(self.colour)} on {self.pixels} pixel{'s' if self.pixels > 1 else ''} "
            f"(nearest is {_hex(self.nearest)}, class {self.index})"
        )


class StrayColoursError(ValueError):
    """A map has colours that are not in the palette: `strays`, the most frequent first."""

    def __init__(self, strays: tuple[Stray, ...]) -> None:
        named = ", ".join(map(str, strays[:MOST_NAMED]))
        rest = strays[MOST_NAMED:]
        more = f", and {len(rest)} more on {sum(stray.pixels for stray in rest)} pixels" if rest else ""
        super().__init__(
            f"found {len(strays)} colour{'s' if len(strays) > 1 else ''} not in the palette: {named}{more}; "
            "allowed are the palette's; add a class, or mend the map (lossy formats and smoothed edges mix colours)"
        )
        self.strays = strays


def index_map(image: Image.Image, palette: Mapping[Colour, int]) -> np.ndarray:
    """A colour-coded map (mode RGB) -> class indices uint8 [H, W]; the colours must be exactly the palette's.

    Raises `StrayColoursError`, a ValueError that names every stray colour with its pixels and the nearest colour, and
    ValueError if the image is not RGB or the palette is empty.
    """
    if image.mode != "RGB":
        raise ValueError(f"found a picture of mode {image.mode}; allowed is RGB; convert it")
    if not palette:
        raise ValueError("found an empty palette; it needs a colour for every class; give the class file colours")
    codes = _codes(np.asarray(image))  # [H, W]
    known = _codes(np.array(list(palette), dtype=np.uint8))  # [K]
    order = np.argsort(known)
    place = np.searchsorted(known[order], codes).clip(max=len(known) - 1)
    strange = known[order][place] != codes
    if strange.any():
        raise StrayColoursError(_strays(codes[strange], palette))
    return np.array(list(palette.values()), dtype=np.uint8)[order][place]


def recolour_map(indices: np.ndarray, palette: Mapping[Colour, int]) -> Image.Image:
    """Class indices uint8 [H, W] -> a palette picture (mode P): its pixels are the indices, shown in their colours.

    Where two colours stand for one class the last is shown. Undoes `index_map` if there are none such.
    """
    table = np.zeros((256, 3), dtype=np.uint8)
    for colour, index in palette.items():
        table[index] = colour
    image = Image.fromarray(np.ascontiguousarray(indices, dtype=np.uint8))
    image.putpalette(table.tobytes())  # turns mode L into P, indices unchanged
    return image


def _codes(colours: np.ndarray) -> np.ndarray:
    """uint8 [..., 3] -> one number a colour, int32 [...]."""
    parts = colours.astype(np.int32)
    return parts[..., 0] << 16 | parts[..., 1] << 8 | parts[..., 2]


def _strays(codes: np.ndarray, palette: Mapping[Colour, int]) -> tuple[Stray, ...]:
    values, counts = np.unique(codes, return_counts=True)
    colours = np.array(list(palette), dtype=np.int64)  # [K, 3]
    strays = []
    for position in np.argsort(-counts, kind="stable"):
        value = int(values[position])
        colour = (value >> 16, value >> 8 & 255, value & 255)
        near = int(((colours - colour) ** 2).sum(axis=1).argmin())
        red, green, blue = colours[near].tolist()
        nearest = (red, green, blue)
        strays.append(Stray(colour, int(counts[position]), nearest, palette[nearest]))
    return tuple(strays)


def _hex(colour: Colour) -> str:
    return "#{:02x}{:02x}{:02x}".format(*colour)


@dataclass(frozen=True)
class _Entry:
    line: int
    index: int
    name: str
    colour: Colour | None


def _read(path: Path) -> list[_Entry]:
    """The entries in the order of their indices."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: found bytes that are not UTF-8 text; allowed is UTF-8; save it so") from error
    parsed = []
    for number, line in enumerate(lines, start=1):
        words = line.split()
        if words and not words[0].startswith("#"):
            parsed.append((number, *_parse(words, f"{path}, line {number}")))
    if not parsed:
        raise ValueError(f"{path}: found no class; a class file has one a line; write their names into it")
    entries = []
    for position, (number, given, name, colour) in enumerate(parsed):
        if (given is None) != (parsed[0][1] is None):
            here, first = ("no index", "one") if given is None else (f"index {given}", "none")
            raise ValueError(
                f"{path}, line {number}: found {here} before {name!r}, but {first} in line {parsed[0][0]}; "
                "allowed is one in every line or in none; number all of them"
            )
        if given is None and position >= UNKNOWN_CLASS:
            raise ValueError(
                f"{path}, line {number}: found {len(parsed)} classes; allowed are at most {UNKNOWN_CLASS} "
                "(255 is unknown); merge some"
            )
        entries.append(_Entry(number, position if given is None else given, name, colour))
    _check(entries, path)
    return sorted(entries, key=lambda entry: entry.index)


def _parse(words: list[str], where: str) -> tuple[int | None, str, Colour | None]:
    """The index (None without one), name and colour (None without one) of a line."""
    words, colour = _without_colour(words, where)
    index = None
    if len(words) > 1 and _is_whole(words[0]):
        index = int(words[0])
        words = words[1:]
    for word in words:
        if word.startswith("#"):
            raise ValueError(
                f"{where}: found {word!r} after the name; allowed there is a colour as #rrggbb; "
                "put comments on lines of their own"
            )
    return index, " ".join(words), colour


def _without_colour(words: list[str], where: str) -> tuple[list[str], Colour | None]:
    if len(words) > 1 and _HEX.fullmatch(words[-1]):
        digits = words[-1][1:]
        return words[:-1], (int(digits[:2], 16), int(digits[2:4], 16), int(digits[4:], 16))
    if len(words) > 3 and all(map(_is_whole, words[-3:])):
        red, green, blue = map(int, words[-3:])
        if max(red, green, blue) > 255:
            raise ValueError(f"{where}: found the colour {red} {green} {blue}; allowed is 0 to 255 each; lower it")
        return words[:-3], (red, green, blue)
    return words, None


def _is_whole(word: str) -> bool:
    return word.isascii() and word.isdecimal() and len(word) < 10


def _check(entries: list[_Entry], path: Path) -> None:
    for kind in ("name", "index", "colour"):
        seen: dict[object, int] = {}
        for entry in entries:
            value = getattr(entry, kind)
            if value is not None and value in seen:
                shown = _hex(value) if kind == "colour" else repr(value)
                raise ValueError(
                    f"{path}, line {entry.line}: found the {kind} {shown} of line {seen[value]} again; "
                    "allowed is once; change one of them"
                )
            seen[value] = entry.line
    classes = sorted((entry for entry in entries if entry.index != UNKNOWN_CLASS), key=lambda entry: entry.index)
    for index, entry in enumerate(classes):
        if entry.index > UNKNOWN_CLASS:
            raise ValueError(
                f"{path}, line {entry.line}: found class {entry.index}; allowed are at most 255 classes, 0 to 254 "
                "(255 is unknown); merge some"
            )
        if entry.index != index:
            raise ValueError(
                f"{path}, line {entry.line}: found index {entry.index}, but none is {index}; allowed are 0 to "
                f"{len(classes) - 1} without gaps; add class {index}, or number them anew"
            )
    if not classes:
        raise ValueError(f"{path}: found no class but 255, which is unknown; write the names of the classes into it")

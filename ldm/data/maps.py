"""Colour-coded semantic maps to index maps: a whole folder, and only if every colour of every file is known."""

from __future__ import annotations

import posixpath
from collections.abc import Callable, Iterable
from pathlib import Path

from tqdm import tqdm

from conditioning.class_file import Palette, StrayColoursError, index_map, read_palette, recolour_map
from ldm.data.folder_index import walk_files
from ldm.data.images import SUFFIXES, open_image
from ldm.data.sample import BadSample
from ldm.errors import UserError, user_input
from ldm.files import whole_folder


def convert_maps(
    folder: Path,
    out: Path,
    classes: Path,
    *,
    progress: bool = True,
    on_problem: Callable[[str], None] = lambda problem: None,
) -> int:
    """Write the colour-coded maps below `folder` as index PNGs into the new or empty folder `out`; how many they are.

    `classes` is a class file with a colour for every class (conditioning/class_file.py). Subfolders and names are kept,
    the suffix becomes .png; the PNGs have a palette, so that they look as before while their pixels are class indices.
    Every file is read and checked before anything is written; `on_problem` gets one line for every stray colour and
    every broken file. The folder appears under its name only when it is complete.

    Raises:
        UserError: no such folder, no picture in it, a broken class file, `out` holds something or lies inside
            `folder`, two files would get one name, or there were problems; nothing was written.
        OSError: the disk refuses; what was written is removed.
    """
    with user_input("--classes"):
        palette = read_palette(classes)
    targets = _targets(folder)
    _check_out(folder, out)
    problems = 0
    broken: set[str] = set()
    for name in tqdm(targets, desc="checking", unit="map", disable=not progress):
        for problem in _problems(folder, name, palette):
            on_problem(problem)
            problems += 1
            broken.add(name)
    if broken:
        raise UserError(
            f"{folder}: found {problems} problem{'s' if problems > 1 else ''} in {len(broken)} of {len(targets)} maps; "
            f"allowed are the colours of {classes}; add classes to it, or mend the maps; nothing was written"
        )
    _write(folder, out.resolve(), targets, palette, progress)
    return len(targets)


def _targets(folder: Path) -> dict[str, str]:
    """The pictures below the folder, sorted, and the names that they get."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give the folder that holds the colour-coded maps")
    targets: dict[str, str] = {}
    sources: dict[str, str] = {}
    for name in sorted(walk_files(folder)):
        stem, suffix = posixpath.splitext(name)
        if suffix.lower() not in SUFFIXES:
            continue
        target = f"{stem}.png"
        if target in sources:
            raise UserError(f"{folder}: found {sources[target]} and {name}, which would both be {target}; rename one")
        targets[name], sources[target] = target, name
    if not targets:
        raise UserError(f"{folder}: found no picture in it; allowed are {', '.join(sorted(SUFFIXES))}; check the path")
    return targets


def _check_out(folder: Path, out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: it exists and is not an empty folder; nothing was written; name a new folder")
    if out.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"{out}: it lies inside {folder}, where it would be taken for maps; name another place")


def _problems(folder: Path, name: str, palette: Palette) -> Iterable[str]:
    try:
        index_map(open_image(folder / name, key=name), palette)
    except BadSample as error:
        return [str(error)]
    except StrayColoursError as error:
        return [f"{name}: {stray}" for stray in error.strays]
    return []


def _write(folder: Path, out: Path, targets: dict[str, str], palette: Palette, progress: bool) -> None:
    with whole_folder(out, synced=False) as parts:
        for name, target in tqdm(targets.items(), desc=f"writing {out}", unit="map", disable=not progress):
            with user_input(f"{folder}: it changed meanwhile, nothing was written", BadSample, StrayColoursError):
                indices = index_map(open_image(folder / name, key=name), palette)
            (parts / target).parent.mkdir(parents=True, exist_ok=True)
            recolour_map(indices, palette).save(parts / target)

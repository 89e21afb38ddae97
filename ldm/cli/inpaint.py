"""Repaint where a mask is white. Every other pixel of the result has the bytes that the picture had."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.cli.drawing import Picture, open_model
from ldm.cli.masked import add_mask_arguments, mask_options
from ldm.cli.options import (
    add_condition_arguments,
    add_count_argument,
    add_drawing_arguments,
    add_model_argument,
    add_size_argument,
    check_at_least,
    check_conditions,
    check_options,
    check_seeds,
    open_picture,
    parse_size,
    printable,
)
from ldm.cli.saving import draw_numbered, draw_to_files, write_grid
from ldm.errors import UserError, user_input

if TYPE_CHECKING:
    from PIL import Image

MASK_ENDING = "_mask"
DEFAULT_PADDING = 32
_EXAMPLES = 3
"""Files named in an error; a folder may lack thousands."""


@dataclass(frozen=True)
class Pair:
    """A picture, its mask and its prompt."""

    image: Path
    mask: Path
    prompt: str

    def open(self) -> tuple[Image.Image, Image.Image]:
        """The picture, RGB, and the mask, L, of one size. Raises UserError."""
        from ldm.mask_shaping import mask_array, read_mask

        image, mask = open_picture("--image", self.image), read_mask(self.mask)
        with user_input(printable(str(self.mask)), UserError):
            mask_array(mask, image.size)
        return image, mask


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `ldm inpaint`."""
    add_model_argument(parser)
    parser.add_argument("--image", type=Path, metavar="FILE", help="the picture, of any size")
    parser.add_argument("--mask", type=Path, metavar="FILE", help="of the same size; white = repaint, grey = in part")
    parser.add_argument(
        "--folder",
        type=Path,
        metavar="DIR",
        help="instead: many pairs, x.png and x_mask.png, with their prompts in x.txt or else --prompt",
    )
    parser.add_argument("--prompt", default="", metavar="TEXT", help="what to draw in the hole")
    add_condition_arguments(parser)
    add_mask_arguments(parser)
    parser.add_argument("--dilate", type=int, default=0, metavar="PX", help="grow the mask first (default: 0)")
    parser.add_argument(
        "--only-masked",
        nargs="?",
        type=int,
        const=DEFAULT_PADDING,
        metavar="PADDING",
        help=f"work on the mask's bounding box and PADDING pixels around it (default: {DEFAULT_PADDING}), enlarged to "
        "--size, and stitch the result back",
    )
    add_size_argument(parser, "the model's own; with --only-masked only")
    add_count_argument(parser, "images for each mask")
    add_drawing_arguments(parser)


def run(arguments: argparse.Namespace) -> None:
    """Check every pair, then draw and write."""
    check_at_least(arguments, 1, "count")
    check_at_least(arguments, 0, "dilate", "only_masked")
    height, width = parse_size(arguments.size)
    if arguments.size is not None and arguments.only_masked is None:
        raise UserError("--size: found without --only-masked, where the picture keeps its own; add it, or leave it out")
    inputs, facts = check_conditions(arguments)
    inpainting, mask_facts = mask_options(arguments, arguments.dilate, arguments.only_masked)
    options = check_options(arguments, facts=facts | mask_facts, strength=arguments.strength, inpainting=inpainting)
    pairs = read_pairs(arguments)
    check_pairs(pairs)
    out = check_names(pairs, arguments)
    seeds = check_seeds(arguments.seed, len(pairs) * arguments.count)
    repeated = [pair for pair in pairs for _ in range(arguments.count)]
    pictures = [picture_of(pair, seed, inputs) for pair, seed in zip(repeated, seeds, strict=True)]
    pipeline = open_model(arguments)
    if arguments.only_masked is not None:
        height, width = pipeline.resolve_size(height, width)
        options = replace(options, height=height, width=width)
    if arguments.folder is not None:
        draw_to_files(pipeline, pictures, options, lambda index: out[index])
        return
    images = draw_numbered(pipeline, pictures, options, arguments.out)
    given = list(pairs[0].open())
    captions = ["picture", "mask", *[pairs[0].prompt or "repainted"] * len(images)]
    write_grid([*given, *images], captions, None, arguments.out)


def picture_of(pair: Pair, seed: int, conditions: Mapping[str, Any]) -> Picture:
    """The picture to draw for a pair, whose files are opened when its turn comes."""

    def inputs() -> Mapping[str, Any]:
        image, mask = pair.open()
        return {"image": image, "mask_image": mask, **conditions}

    names = {"Image": printable(pair.image.name), "Mask": printable(pair.mask.name)}
    return Picture(prompt=pair.prompt, seed=seed, inputs=inputs, facts=names)


def read_pairs(arguments: argparse.Namespace) -> list[Pair]:
    """The pair of the command line, or those of the folder. Raises UserError."""
    single = (arguments.image, arguments.mask)
    if arguments.folder is None:
        if None in single:
            raise UserError("found no --image with --mask; give both, or --folder DIR with pairs of them")
        return [Pair(*single, arguments.prompt)]
    if single != (None, None):
        raise UserError("--folder: found beside --image or --mask; allowed is one of the two ways; leave one out")
    return pairs_in(arguments.folder, arguments.prompt)


def pairs_in(folder: Path, prompt: str) -> list[Pair]:
    """The pairs x.png, x_mask.png of a folder by name, any picture suffix; `prompt` for those without x.txt.

    Raises UserError when a partner is missing, two pictures share a name, or there is no pair.
    """
    from ldm.data.images import SUFFIXES

    with user_input("--folder"):
        files = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and path.is_file())
    by_stem: dict[str, Path] = {}
    for path in files:
        if path.stem in by_stem:
            names = printable(f"{by_stem[path.stem].name} and {path.name}")
            raise UserError(f"--folder {folder}: found both {names}; allowed is one of a name; rename one")
        by_stem[path.stem] = path
    images = [stem for stem in by_stem if not stem.endswith(MASK_ENDING)]
    masks = [stem for stem in by_stem if stem.endswith(MASK_ENDING)]
    lonely = [stem for stem in images if stem + MASK_ENDING not in by_stem]
    lonely += [stem for stem in masks if stem.removesuffix(MASK_ENDING) not in by_stem]
    if lonely or not images:
        found = _named([by_stem[stem] for stem in lonely]) + " without partner" if lonely else "no pictures"
        raise UserError(f"--folder {folder}: found {found}; allowed is pairs x.png, x_mask.png; complete them")
    return [Pair(by_stem[stem], by_stem[stem + MASK_ENDING], _prompt_of(by_stem[stem], prompt)) for stem in images]


def _named(paths: Sequence[Path]) -> str:
    more = f" and {len(paths) - _EXAMPLES} more" if len(paths) > _EXAMPLES else ""
    return printable(", ".join(path.name for path in paths[:_EXAMPLES])) + more


def _prompt_of(image: Path, otherwise: str) -> str:
    path = image.with_suffix(".txt")
    if not path.is_file():
        return otherwise
    with user_input(printable(str(path))):
        return " ".join(path.read_text(encoding="utf-8").split())


def check_pairs(pairs: Sequence[Pair]) -> None:
    """Raise UserError for the first pair that cannot be used; warn of masks that repaint nothing."""
    for pair in pairs:
        _, mask = pair.open()
        if mask.getbbox() is None:
            name = printable(str(pair.mask))
            print(f"{name}: black all over, so nothing is repainted; white marks what is", file=sys.stderr)


def check_names(pairs: Sequence[Pair], arguments: argparse.Namespace) -> list[Path]:
    """Where each picture of a folder goes: OUT/x.png, or with --count OUT/x-1.png, ...; UserError if it is taken."""
    if arguments.folder is None:
        return []
    endings = [""] if arguments.count == 1 else [f"-{number}" for number in range(1, arguments.count + 1)]
    paths = [arguments.out / f"{pair.image.stem}{ending}.png" for pair in pairs for ending in endings]
    same = arguments.out.exists() and arguments.out.samefile(arguments.folder)
    taken = [path for path in paths if path.exists()]
    if same or taken:
        found = "the folder of the pictures itself" if same else f"{_named(taken)} there already"
        raise UserError(f"--out {arguments.out}: found {found}; allowed is a new folder; name another")
    return paths

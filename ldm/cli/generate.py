"""Draw pictures from prompts, semantic maps and classes: PNG files that hold their parameters, and a captioned grid."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.cli.drawing import Picture, noise_of, open_model
from ldm.cli.options import (
    DrawingOptions,
    add_condition_arguments,
    add_count_argument,
    add_drawing_arguments,
    add_model_argument,
    add_size_argument,
    check_at_least,
    check_conditions,
    check_options,
    check_seeds,
    parse_size,
)
from ldm.cli.saving import GRID_LIMIT, draw_numbered, write_grid
from ldm.errors import UserError, user_input

if TYPE_CHECKING:
    from ldm.pipeline import LatentDiffusionPipeline


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `ldm generate`."""
    add_model_argument(parser)
    parser.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="what to draw; repeatable")
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="text file with one prompt a line")
    add_condition_arguments(parser)
    add_count_argument(parser, "images for each prompt")
    add_size_argument(parser, "the model's own")
    parser.add_argument(
        "--variation-strength",
        type=float,
        metavar="S",
        help="0 to 1: draw neighbours of the one picture of --seed, so far away from it",
    )
    parser.add_argument(
        "--variation-seed", type=int, metavar="N", help="image i is the neighbour of seed N + i (default: random)"
    )
    add_drawing_arguments(parser)


def run(arguments: argparse.Namespace) -> None:
    """Check everything, draw batch by batch, and write each picture as soon as its batch is done."""
    prompts = read_prompts(arguments.prompt, arguments.prompts)
    height, width = parse_size(arguments.size)
    check_at_least(arguments, 1, "count")
    check_variation(arguments.variation_strength, arguments.variation_seed)
    inputs, facts = check_conditions(arguments)
    options = check_options(arguments, facts=facts)
    given = [prompt for prompt in prompts or [""] for _ in range(arguments.count)]
    seeds, variations = draw_seeds(arguments, len(given))
    pipeline = open_model(arguments)
    if not prompts and not inputs and pipeline.text_encoder is not None:
        raise UserError("found no prompt; give --prompt TEXT or --prompts FILE")
    height, width = pipeline.resolve_size(height, width)
    options = replace(options, height=height, width=width)
    pictures = [
        Picture(prompt=prompt, seed=seed, inputs=lambda: inputs) for prompt, seed in zip(given, seeds, strict=True)
    ]
    if variations is not None:
        pairs = zip(pictures, variations, strict=True)
        pictures = [varied(pipeline, one, options, seed, arguments.variation_strength) for one, seed in pairs]
    images = draw_numbered(pipeline, pictures, options, arguments.out)
    columns = arguments.count if arguments.count > 1 else None
    if "semantic_map" in inputs:
        from ldm.picture import colour_map

        images, given = [colour_map(inputs["semantic_map"]), *images], ["the map", *given]
        columns = None  # with the map in front, a row is no longer one prompt
    write_grid(images, given, columns, arguments.out)
    if len(pictures) > GRID_LIMIT:
        print(f"grid.png holds the first {GRID_LIMIT} of {len(pictures)} pictures", file=sys.stderr)


def varied(
    pipeline: LatentDiffusionPipeline, picture: Picture, options: DrawingOptions, variation_seed: int, strength: float
) -> Picture:
    """A neighbour of `picture`: its noise, moved by `strength` along the arc to that of `variation_seed`."""
    from ldm.interpolation import slerp

    def inputs() -> Mapping[str, Any]:
        noise, generator = noise_of(pipeline, picture.seed, options)
        other, _ = noise_of(pipeline, variation_seed, options)
        return {**picture.inputs(), "latents": slerp(noise, other, strength), "generator": generator}

    return replace(
        picture, inputs=inputs, facts={"Variation seed": variation_seed, "Variation seed strength": strength}
    )


def draw_seeds(arguments: argparse.Namespace, count: int) -> tuple[Sequence[int], Sequence[int] | None]:
    """The seed of each picture, and of the noise that it is a variation towards; then all have the same seed."""
    if arguments.variation_strength is None:
        return check_seeds(arguments.seed, count), None
    with user_input("--variation-seed", UserError):
        variations = check_seeds(arguments.variation_seed, count)
    return check_seeds(arguments.seed, 1) * count, variations


def check_variation(strength: float | None, seed: int | None) -> None:
    """Raise UserError for a variation of no or an impossible strength."""
    if strength is None and seed is not None:
        raise UserError("--variation-seed: found without --variation-strength; give one of 0 to 1; 0.2 stays near")
    if strength is not None and not 0 <= strength <= 1:
        raise UserError(f"--variation-strength: found {strength}; allowed is 0 to 1; 0.2 stays near")


def read_prompts(given: list[str], file: Path | None) -> list[str]:
    """The prompts of the command line, then those of the file; blank lines of the file are skipped."""
    prompts = list(given)
    if file is not None:
        with user_input(f"--prompts {file}"):
            lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
        prompts += [line for line in lines if line]
        if not any(lines):
            raise UserError(f"--prompts {file}: found no prompt; allowed is one a line")
    return prompts

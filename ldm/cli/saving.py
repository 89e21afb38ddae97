"""What the drawing commands write: numbered pictures that say how they were made, and a grid."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ldm.cli.drawing import Picture, draw
from ldm.cli.options import SAMPLERS, DrawingOptions, printable

if TYPE_CHECKING:
    from PIL import Image

    from ldm.pipeline import LatentDiffusionPipeline

GRID_LIMIT = 256
"""Pictures in grid.png; a thousand at 512 px would be a file that nothing opens."""


def draw_to_files(
    pipeline: LatentDiffusionPipeline,
    pictures: Sequence[Picture],
    options: DrawingOptions,
    path_of: Callable[[int], Path],
) -> list[Image.Image]:
    """Draw, write each picture as PNG with its parameters and print its path; returns the first GRID_LIMIT."""
    from tqdm import tqdm

    from ldm.picture import save_png

    kept: dict[int, Image.Image] = {}

    def finished(index: int, image: Image.Image) -> None:
        path = path_of(index)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_png(image, path, parameters_of(pipeline, pictures[index], image.size, options))
        tqdm.write(printable(str(path)), file=sys.stdout)
        if index < GRID_LIMIT:
            kept[index] = image

    draw(pipeline, pictures, options, finished)
    return [kept[index] for index in sorted(kept)]


def draw_numbered(
    pipeline: LatentDiffusionPipeline, pictures: Sequence[Picture], options: DrawingOptions, out: Path
) -> list[Image.Image]:
    """The same as OUT/NNNNN-seed.png, numbered on from what is there."""
    first = next_number(out)
    return draw_to_files(
        pipeline, pictures, options, lambda index: out / f"{first + index:05d}-{pictures[index].seed}.png"
    )


def write_grid(images: Sequence[Image.Image], captions: Sequence[str], columns: int | None, out: Path) -> None:
    """Write OUT/grid.png: the first GRID_LIMIT pictures, each above its caption."""
    from ldm.picture import grid, save_png

    path = out / "grid.png"
    save_png(grid(images[:GRID_LIMIT], captions[:GRID_LIMIT], columns), path)
    print(printable(str(path)))


def parameters_of(
    pipeline: LatentDiffusionPipeline, picture: Picture, size: tuple[int, int], options: DrawingOptions
) -> str:
    """How a picture of `size` (width, height) was made, for its file."""
    from ldm.picture import parameters_text
    from ldm.sampling import scheduler_name

    name = scheduler_name(pipeline.make_scheduler(options.scheduler))
    return parameters_text(
        picture.prompt,
        options.negative_prompt,
        steps=options.num_inference_steps,
        sampler=SAMPLERS.get(name, name),
        guidance_scale=options.guidance_scale,
        seed=picture.seed,
        size=size,
        model=pipeline.name,
        extra={**picture.facts, **options.facts},
    )


def next_number(out: Path) -> int:
    """One more than the highest number that a name in `out` begins with, so that no earlier run is overwritten."""
    names = [path.name for path in out.iterdir()] if out.is_dir() else []
    numbers = [int(match[1]) for name in names if (match := re.match(r"(\d{5,})-", name))]
    return max(numbers, default=-1) + 1

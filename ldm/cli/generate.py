"""Draw pictures from prompts: single PNG files that hold their parameters, and a captioned grid."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ldm.cli.entry import check_out_folder
from ldm.errors import UserError, user_input

if TYPE_CHECKING:
    from PIL import Image

    from ldm.pipeline import LatentDiffusionPipeline

GRID_LIMIT = 256
"""Pictures in grid.png; a thousand at 512 px would be a file that nothing opens."""
SAMPLERS = {"dpm++": "DPM++ 2M", "ddim": "DDIM", "ddpm": "DDPM", "euler": "Euler", "heun": "Heun", "unipc": "UniPC"}
"""Our schedulers by the names that other tools write into PNG files."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `ldm generate`."""
    parser.add_argument(
        "--model", required=True, metavar="PATH", help="folder of a pipeline, or a Hugging Face hub id (owner/name)"
    )
    parser.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="what to draw; repeatable")
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="text file with one prompt a line")
    parser.add_argument("--negative", default="", metavar="TEXT", help="what to steer away from")
    parser.add_argument("--steps", type=int, default=30, metavar="N", help="denoising steps (default: %(default)s)")
    parser.add_argument(
        "--guidance",
        type=float,
        default=5.0,
        metavar="SCALE",
        help="1 is none; higher follows the prompt more (default: 5)",
    )
    parser.add_argument("--scheduler", metavar="NAME", help=f"{', '.join(SAMPLERS)} (default: the model's own)")
    parser.add_argument("--seed", type=int, metavar="N", help="image i is drawn from seed N + i (default: random)")
    parser.add_argument("--count", type=int, default=1, metavar="N", help="images for each prompt (default: 1)")
    parser.add_argument("--size", metavar="N|WxH", help="pixels, e.g. 512 or 640x384 (default: the model's own)")
    parser.add_argument("--batch", type=int, default=8, metavar="N", help="images drawn at once (default: 8)")
    parser.add_argument("--dtype", default="auto", help="auto, fp32, bf16 or fp16 (default: auto)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps (default: auto)")
    parser.add_argument(
        "--out", type=Path, default=Path("out"), metavar="DIR", help="folder to write to (default: out)"
    )


def run(arguments: argparse.Namespace) -> None:
    """Check everything, draw batch by batch, and write each picture as soon as its batch is done."""
    prompts = read_prompts(arguments.prompt, arguments.prompts)
    height, width = parse_size(arguments.size)
    for name in ("steps", "count", "batch"):
        if getattr(arguments, name) < 1:
            raise UserError(f"--{name}: found {getattr(arguments, name)}; allowed is 1 or more")
    check_out_folder(arguments.out)

    import torch
    from transformers.utils.logging import disable_progress_bar

    from ldm.guidance import check_guidance_scale
    from ldm.pipeline import LatentDiffusionPipeline
    from ldm.pipeline_inputs import seeds_from
    from ldm.sampling import check_scheduler_name

    check_guidance_scale(arguments.guidance)
    if arguments.scheduler is not None:
        check_scheduler_name(arguments.scheduler)
    disable_progress_bar()  # of loading weights: the bar that people wait for is ours
    prompts = [prompt for prompt in prompts for _ in range(arguments.count)]
    seeds = seeds_from(arguments.seed, len(prompts))
    pipeline = LatentDiffusionPipeline.from_pretrained(arguments.model, dtype=arguments.dtype, device=arguments.device)
    arguments.height, arguments.width = pipeline.resolve_size(height, width)
    try:
        images = draw(pipeline, prompts, seeds, arguments)
    except torch.OutOfMemoryError as error:
        raise UserError(f"out of memory with --batch {arguments.batch}; give a smaller --batch or --size") from error
    write_grid(images[:GRID_LIMIT], prompts[:GRID_LIMIT], arguments)
    if len(images) > GRID_LIMIT:
        print(f"grid.png holds the first {GRID_LIMIT} of {len(images)} pictures", file=sys.stderr)


def draw(
    pipeline: LatentDiffusionPipeline, prompts: Sequence[str], seeds: Sequence[int], arguments: argparse.Namespace
) -> list[Image.Image]:
    """Draw and write every picture as DIR/NNNNN-seed.png, numbered on from what is there; prints each path."""
    from tqdm import tqdm

    from ldm.picture import parameters_text, save_png
    from ldm.sampling import scheduler_name, set_timesteps

    scheduler = pipeline.make_scheduler(arguments.scheduler)
    name = scheduler_name(scheduler)
    number = next_number(arguments.out)
    starts = range(0, len(prompts), arguments.batch)
    images: list[Image.Image] = []

    def advance(*_: object) -> None:
        bar.update()

    with tqdm(total=len(starts) * len(set_timesteps(scheduler, arguments.steps)), unit="step", desc="drawing") as bar:
        for start in starts:
            part = slice(start, start + arguments.batch)
            result = pipeline(
                prompts[part],
                arguments.negative,
                num_inference_steps=arguments.steps,
                guidance_scale=arguments.guidance,
                height=arguments.height,
                width=arguments.width,
                seed=seeds[part],
                scheduler=scheduler,
                callback_on_step_end=advance,
            )
            arguments.out.mkdir(parents=True, exist_ok=True)
            for prompt, seed, image in zip(prompts[part], seeds[part], result.images, strict=True):
                path = arguments.out / f"{number + len(images):05d}-{seed}.png"
                parameters = parameters_text(
                    prompt,
                    arguments.negative,
                    steps=arguments.steps,
                    sampler=SAMPLERS.get(name, name),
                    guidance_scale=arguments.guidance,
                    seed=seed,
                    size=image.size,
                    model=pipeline.name,
                )
                save_png(image, path, parameters)
                bar.write(str(path), file=sys.stdout)
                images.append(image)
    return images


def write_grid(images: Sequence[Image.Image], prompts: Sequence[str], arguments: argparse.Namespace) -> None:
    """Write DIR/grid.png: every picture above its prompt, the pictures of one prompt in a row."""
    from ldm.picture import grid, save_png

    path = arguments.out / "grid.png"
    save_png(grid(images, prompts, arguments.count if arguments.count > 1 else None), path)
    print(path)


def next_number(out: Path) -> int:
    """One more than the highest number of a picture in `out`, so that no earlier run is overwritten."""
    names = [path.name for path in out.glob("*.png")] if out.is_dir() else []
    numbers = [int(match[1]) for name in names if (match := re.fullmatch(r"(\d{5,})-\d+\.png", name))]
    return max(numbers, default=-1) + 1


def read_prompts(given: list[str], file: Path | None) -> list[str]:
    """The prompts of the command line, then those of the file; blank lines of the file are skipped."""
    prompts = list(given)
    if file is not None:
        with user_input(f"--prompts {file}"):
            lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
        prompts += [line for line in lines if line]
        if not any(lines):
            raise UserError(f"--prompts {file}: found no prompt; allowed is one a line")
    if not prompts:
        raise UserError("found no prompt; give --prompt TEXT or --prompts FILE")
    return prompts


def parse_size(text: str | None) -> tuple[int | None, int | None]:
    """`--size` as (height, width): "512" is a square, "640x384" is width x height, None the model's own."""
    if text is None:
        return None, None
    match = re.fullmatch(r"(\d+)(?:[xX×](\d+))?", text.strip())
    if match is None:
        raise UserError(f"--size: found {text!r}; allowed is N or WIDTHxHEIGHT in pixels, e.g. 512 or 640x384")
    return int(match[2] or match[1]), int(match[1])

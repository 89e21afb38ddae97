"""The options that all drawing commands share, checked before a model is loaded."""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.cli.entry import check_out_folder
from ldm.cli.memory import add_memory_arguments, memory_facts
from ldm.errors import UserError, user_input

if TYPE_CHECKING:
    from collections.abc import Mapping

    from PIL import Image

    from ldm.canvas import InpaintingOptions
    from ldm.guidance import GuidanceOptions

SAMPLERS = {"dpm++": "DPM++ 2M", "ddim": "DDIM", "ddpm": "DDPM", "euler": "Euler", "heun": "Heun", "unipc": "UniPC"}
"""Our schedulers by the names that other tools write into PNG files."""


@dataclass(frozen=True, kw_only=True)
class DrawingOptions:
    """What holds for every picture of one command; the names are those of the pipeline's call.

    `facts` are written into each picture beside the usual parameters.
    """

    negative_prompt: str
    num_inference_steps: int
    guidance_scale: float | Mapping[str, float]
    guidance: GuidanceOptions
    scheduler: str | None
    batch: int
    verbose: bool
    height: int | None = None
    width: int | None = None
    strength: float | None = None
    clip_skip: int | None = None
    inpainting: InpaintingOptions | None = None
    facts: dict[str, object] = field(default_factory=dict)


def add_model_argument(parser: argparse.ArgumentParser) -> None:
    """`--model`."""
    parser.add_argument(
        "--model",
        required=True,
        metavar="PATH",
        help="folder of a pipeline or a run, a single file (.safetensors), or a Hugging Face hub id (owner/name)",
    )
    parser.add_argument(
        "--lora",
        action="append",
        default=[],
        metavar="PATH[=W]",
        help="a LoRA, a file or the run that made it, and its weight (1); repeatable",
    )
    parser.add_argument(
        "--embedding",
        action="append",
        default=[],
        metavar="PATH[=WORD]",
        help="a word of textual inversion, a file or the run that made it, and another name for it; repeatable",
    )
    parser.add_argument("--vae", type=Path, metavar="PATH", help="another autoencoder: folder, or file of one alone")
    parser.add_argument("--variant", metavar="NAME", help="which weights of a folder or hub id, such as fp16")
    parser.add_argument(
        "--allow-pickle", action="store_true", help="open a .ckpt, which is a pickle; better convert it"
    )


def add_condition_arguments(parser: argparse.ArgumentParser) -> None:
    """What to draw, besides the prompt."""
    parser.add_argument("--negative", default="", metavar="TEXT", help="what to steer away from")
    parser.add_argument(
        "--semantic-map", type=Path, metavar="MAP", help="PNG of class indices (palette or grey), 255 = unknown"
    )
    parser.add_argument("--label", metavar="NAME|N", help="class, by name or number")


def add_drawing_arguments(parser: argparse.ArgumentParser, *, steps: str = "30", guidance: str = "5") -> None:
    """How to draw, and where to; `steps` and `guidance` are what the help says of the defaults."""
    parser.add_argument("--steps", type=int, metavar="N", help=f"denoising steps (default: {steps})")
    parser.add_argument(
        "--guidance",
        metavar="SCALE",
        help="1 is none; higher follows the conditions more; one number, or one for each: text=7,semantic=2 "
        f"(default: {guidance})",
    )
    parser.add_argument(
        "--guidance-interval",
        nargs=2,
        type=float,
        default=(0.0, 1.0),
        metavar=("LOW", "HIGH"),
        help="guide only at noise levels in this part of 0 (the end) to 1 (pure noise)",
    )
    parser.add_argument(
        "--guidance-rescale", type=float, default=0.0, metavar="PHI", help="0 to 1, against overexposure; 0.7 is usual"
    )
    parser.add_argument("--apg", action="store_true", help="adaptive projected guidance, against saturated colours")
    parser.add_argument(
        "--clip-skip", type=int, metavar="N", help="leave out the text encoder's last N blocks (A1111 counts from 1)"
    )
    parser.add_argument("--scheduler", metavar="NAME", help=f"{', '.join(SAMPLERS)} (default: the model's own)")
    parser.add_argument("--seed", type=int, metavar="N", help="image i is drawn from seed N + i (default: random)")
    parser.add_argument("--batch", type=int, default=8, metavar="N", help="images drawn at once (default: 8)")
    parser.add_argument("--dtype", default="auto", help="auto, fp32, bf16 or fp16 (default: auto)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps (default: auto)")
    parser.add_argument(
        "--out", type=Path, default=Path("out"), metavar="DIR", help="folder to write to (default: out)"
    )
    add_memory_arguments(parser)
    parser.add_argument(
        "--verbose", action="store_true", help="say what the guidance costs, its scales, and the attention kernel used"
    )


def add_count_argument(parser: argparse.ArgumentParser, of: str = "images") -> None:
    """`--count`."""
    parser.add_argument("--count", type=int, default=1, metavar="N", help=f"{of} (default: 1)")


def add_size_argument(parser: argparse.ArgumentParser, default: str) -> None:
    """`--size`; `default` is what the help says of it."""
    parser.add_argument("--size", metavar="N|WxH", help=f"pixels, e.g. 512 or 640x384 (default: {default})")


def check_at_least(arguments: argparse.Namespace, least: int, *names: str) -> None:
    """Raise UserError for an option that is given and below `least`; names as in the namespace."""
    for name in names:
        found = getattr(arguments, name)
        if found is not None and found < least:
            raise UserError(f"--{name.replace('_', '-')}: found {found}; allowed is {least} or more")


def check_options(
    arguments: argparse.Namespace, *, steps: int = 30, guidance: str = "5", strength: float | None = None, **rest: Any
) -> DrawingOptions:
    """The shared options and `rest`, further fields of `DrawingOptions`. Raises UserError.

    `steps` and `guidance` are the defaults.
    """
    check_at_least(arguments, 1, "steps", "batch")
    check_at_least(arguments, 0, "clip_skip")
    check_out_folder(arguments.out)

    from ldm.guidance import GuidanceOptions, parse_guidance_scale
    from ldm.projected_guidance import ApgOptions
    from ldm.sampling import check_scheduler_name, starting_step

    steps = arguments.steps or steps
    scale = parse_guidance_scale(guidance if arguments.guidance is None else arguments.guidance)
    with user_input("--guidance-interval, --guidance-rescale", ValueError):
        guidance_options = GuidanceOptions(
            interval=tuple(arguments.guidance_interval),
            rescale=arguments.guidance_rescale,
            apg=ApgOptions() if arguments.apg else None,
        )
    if arguments.scheduler is not None:
        check_scheduler_name(arguments.scheduler)
    if strength is not None:
        starting_step(steps, strength)
    facts = _guidance_facts(guidance_options) | memory_facts(arguments) | rest.pop("facts", {})
    if arguments.clip_skip:
        facts["Clip skip"] = arguments.clip_skip + 1  # A1111's number: 1 leaves out none
    return DrawingOptions(
        negative_prompt=arguments.negative,
        num_inference_steps=steps,
        guidance_scale=scale,
        guidance=guidance_options,
        scheduler=arguments.scheduler,
        batch=arguments.batch,
        verbose=arguments.verbose,
        strength=strength,
        clip_skip=arguments.clip_skip,
        facts=facts | ({} if strength is None else {"Denoising strength": strength}),
        **rest,
    )


def _guidance_facts(guidance: GuidanceOptions) -> dict[str, object]:
    facts: dict[str, object] = {}
    if guidance.interval != (0, 1):
        facts["Guidance interval"] = "{:g}-{:g}".format(*guidance.interval)
    if guidance.rescale:
        facts["CFG Rescale phi"] = guidance.rescale
    if guidance.apg is not None:
        facts["APG"] = f"eta {guidance.apg.eta:g} momentum {guidance.apg.momentum:g}"
    return facts


def check_conditions(arguments: argparse.Namespace) -> tuple[dict[str, Any], dict[str, object]]:
    """The map and the label, if given: for the pipeline's call, and as facts for the file. Raises UserError."""
    inputs: dict[str, Any] = {}
    facts: dict[str, object] = {}
    if arguments.semantic_map is not None:
        from conditioning.semantic import read_map

        with user_input("--semantic-map"):
            inputs["semantic_map"] = read_map(arguments.semantic_map)  # int64 [H, W]
        facts["Semantic map"] = printable(arguments.semantic_map.name)
    if arguments.label is not None:
        inputs["label"] = facts["Label"] = arguments.label
    return inputs, facts


def check_seeds(seed: int | None, count: int) -> tuple[int, ...]:
    """The seed of each of `count` pictures. Raises UserError."""
    from ldm.pipeline_inputs import seeds_from

    return seeds_from(seed, count)


def open_picture(option: str, path: Path) -> Image.Image:
    """The picture in a file as RGB; `option` names it in the `UserError` for one that cannot be read."""
    from ldm.data.images import open_image
    from ldm.data.sample import BadSample

    with user_input(option, BadSample):
        return open_image(path)


def parse_size(text: str | None) -> tuple[int | None, int | None]:
    """`--size` as (height, width): "512" is a square, "640x384" is width x height, None the model's own."""
    if text is None:
        return None, None
    match = re.fullmatch(r"(\d+)(?:[xX×](\d+))?", text.strip())
    if match is None:
        raise UserError(f"--size: found {text!r}; allowed is N or WIDTHxHEIGHT in pixels, e.g. 512 or 640x384")
    return int(match[2] or match[1]), int(match[1])


def printable(text: str) -> str:
    """File names may hold bytes that are no UTF-8; they are shown escaped."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")

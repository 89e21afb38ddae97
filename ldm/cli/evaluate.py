"""Score a model on prompts of held-out scenes: what the exact scorer finds in the pictures, as figures and a grid."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from ldm.cli.entry import check_out_folder
from ldm.errors import UserError

if TYPE_CHECKING:
    from PIL import Image

    from ldm.data.sources import DataConfig
    from ldm.evaluation.drawing import PipelineDrawer
    from ldm.evaluation.scenes import SceneScore

SHOWN = 32
"""Pictures in the grid."""
STATEMENTS = ("background", "objects", "colours", "sizes", "relation")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `ldm evaluate`."""
    parser.add_argument("model", type=Path, metavar="RUN_OR_MODEL", help="a run of train_ldm.py, or a pipeline folder")
    parser.add_argument(
        "--data", type=Path, metavar="CONFIG", help="config whose data section names the scenes (a run has its own)"
    )
    parser.add_argument("--count", type=int, default=64, help="held-out prompts (default 64)")
    parser.add_argument("--steps", type=int, default=25, help="denoising steps (default 25)")
    parser.add_argument(
        "--guidance", default="4", metavar="SCALE", help="one number, or text=4,semantic=2,... (default 4)"
    )
    parser.add_argument(
        "--conditions",
        action="store_true",
        help="measure what each condition of the model does, alone and together: up to 13 pictures for each of --count",
    )
    parser.add_argument("--scheduler", default="ddim", help="ddpm, ddim, euler, heun, dpm++ or unipc (default ddim)")
    parser.add_argument("--batch", type=int, default=64, help="pictures drawn at once (default 64)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto", help="auto, fp32, bf16 or fp16")
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for metrics.json and grid.png (or conditions.json and .png)"
    )


def run(args: argparse.Namespace) -> None:
    """Draw, score, write."""
    from ldm.config import load_section
    from ldm.data.scenes import held_out_prompts
    from ldm.data.sources import DataConfig
    from ldm.evaluation.drawing import PipelineDrawer
    from ldm.evaluation.scenes import confusion_matrix, rates, score_each
    from ldm.guidance import parse_guidance_scale
    from ldm.picture import save_png
    from ldm.pipeline import LatentDiffusionPipeline
    from ldm.sampling import check_scheduler_name
    from ldm.training.checkpoint import write_atomically

    for name in ("count", "steps", "batch"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name}: found {getattr(args, name)}; allowed is 1 or more")
    guidance_scale = parse_guidance_scale(args.guidance)
    check_scheduler_name(args.scheduler)
    check_out_folder(args.out)
    pipeline_folder = args.model / "pipeline" if (args.model / "pipeline").is_dir() else args.model
    config_path = args.data or args.model / "config.yaml"
    if not config_path.is_file():
        raise UserError(f"{config_path}: no such config; give a run folder, or --data CONFIG beside a pipeline folder")
    data = load_section(DataConfig, config_path, "data")
    if data.source != "scenes":
        raise UserError(
            f"{config_path}: found data.source {data.source}; the exact scorer knows the built-in scenes only"
        )
    pipeline = LatentDiffusionPipeline.from_pretrained(pipeline_folder, dtype=args.dtype, device=args.device)
    drawer = PipelineDrawer(pipeline, args.steps, guidance_scale, args.scheduler, args.batch)
    if args.conditions:
        _measure_conditions(drawer, data, args)
        return
    prompts = held_out_prompts(data.scenes, args.count, args.seed)
    seeds = range(args.seed, args.seed + args.count)
    images = drawer(prompt=[prompt for prompt, _ in prompts], seeds=seeds)
    scenes = [scene for _, scene in prompts]
    scores = score_each(images, scenes, data.scenes)
    result = rates(scores)
    args.out.mkdir(parents=True, exist_ok=True)
    settings = {name: getattr(args, name) for name in ("steps", "guidance", "scheduler", "seed")}
    settings = {"model": str(args.model), "prompts": "held-out combinations", **settings}
    metrics = {**settings, **result, "confusion": confusion_matrix(scores)}
    write_atomically(args.out / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    save_png(_grid(images, [prompt for prompt, _ in prompts], scores), args.out / "grid.png")
    print(describe(result))
    print(f"picture: {args.out / 'grid.png'}   figures: {args.out / 'metrics.json'}")


def describe(result: dict[str, float]) -> str:
    """`64 pictures: background 95.3 %, objects ...`."""
    parts = ", ".join(f"{name} {100 * value:.1f} %" for name, value in result.items() if name != "images")
    return f"{result['images']:.0f} pictures of held-out prompts, right are: {parts}"


def _measure_conditions(drawer: PipelineDrawer, data: DataConfig, args: argparse.Namespace) -> None:
    """Measure each condition of the model, alone and together; write figures and pictures."""
    from ldm.evaluation.conditions import measure_conditions
    from ldm.picture import save_png
    from ldm.training.checkpoint import write_atomically

    names = drawer.pipeline.conditions
    report = measure_conditions(drawer, data.scenes, names, args.count, args.seed, data.resolution)
    args.out.mkdir(parents=True, exist_ok=True)
    settings = {name: getattr(args, name) for name in ("steps", "guidance", "scheduler")}
    figures = {"model": str(args.model), **settings, **report.as_dict()}
    write_atomically(args.out / "conditions.json", json.dumps(figures, indent=2) + "\n")
    save_png(report.pictures, args.out / "conditions.png")
    print(report.summary())
    print(f"picture: {args.out / 'conditions.png'}   figures: {args.out / 'conditions.json'}")


def _grid(images: list[Image.Image], prompts: list[str], scores: list[SceneScore]) -> Image.Image:
    """The first pictures with their prompts; a prompt that is not fully met says what is wrong."""
    from ldm.picture import grid

    captions = []
    for prompt, score in list(zip(prompts, scores, strict=True))[:SHOWN]:
        wrong = [part for part in STATEMENTS if getattr(score, part) is False]
        captions.append(prompt + (f"  [wrong: {', '.join(wrong)}]" if wrong else ""))
    return grid(images[:SHOWN], captions=captions, columns=8)

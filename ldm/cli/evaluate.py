"""Measure a diffusion model or an autoencoder: one page of pictures, figures with intervals and plots, offline."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.cli.reporting import (
    CACHE,
    IMAGES,
    add_report_arguments,
    autoencoder_folder,
    check_report,
    drawing_of,
    find_data,
    measuring_of,
    shared_work,
)
from ldm.errors import UserError, user_input

if TYPE_CHECKING:
    from ldm.evaluation.report import Section
    from ldm.evaluation.report_data import ReportData
    from ldm.evaluation.report_drawing import Drawing
    from ldm.evaluation.report_model import Measured
    from ldm.evaluation.scenes import SceneScore

COUNT, CONDITIONS_COUNT, RECONSTRUCTED = 128, 64, 512
"""Pictures drawn, tasks with --conditions, images put through an autoencoder, unless --count says otherwise."""
SHOWN = 32
"""Pictures in grid.png."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `ldm evaluate`."""
    parser.add_argument(
        "model", type=Path, metavar="RUN_OR_MODEL", help="a run of train_ldm.py or train_vae.py, or what they made"
    )
    add_report_arguments(parser, COUNT)
    parser.add_argument(
        "--sweep", metavar="SCALE,SCALE,...", help="also draw at these guidance scales and plot FID against them"
    )
    parser.add_argument("--sweep-count", type=int, default=64, metavar="N", help="pictures at each scale (default 64)")
    parser.add_argument(
        "--likelihood",
        type=int,
        nargs="?",
        const=64,
        default=0,
        metavar="N",
        help="also measure bits per dimension, on N images (default 64)",
    )
    parser.add_argument(
        "--trained",
        type=int,
        nargs="?",
        const=COUNT,
        default=0,
        metavar="N",
        help=f"of scenes: also draw N combinations that training showed, and compare (default {COUNT})",
    )
    parser.add_argument(
        "--training-images",
        type=int,
        default=10_000,
        metavar="N",
        help="training images that copies are looked for in (default 10000)",
    )
    parser.add_argument(
        "--resolution", type=int, metavar="N", help="of an autoencoder: side in pixels (default: its run's, or 256)"
    )
    parser.add_argument(
        "--conditions",
        action="store_true",
        help="instead: what each condition of the model does, alone and together, on built-in scenes; up to 13 "
        "pictures for each of --count (default 64)",
    )


def run(args: argparse.Namespace) -> None:
    """Check, draw, measure, write."""
    check_report(args, "sweep_count", "training_images", "resolution")
    sweep = parse_sweep(args.sweep)
    for name in ("likelihood", "trained"):
        if getattr(args, name) < 0:
            raise UserError(f"--{name}: found {getattr(args, name)}; allowed is 1 or more, or to leave it out")
    drawing = drawing_of(args, COUNT, sweep, args.sweep_count)
    data = find_data(args.data, args.model)
    folder = autoencoder_folder(args.model)
    if folder is not None:
        _evaluate_autoencoder(args, folder, data)
    elif args.conditions:
        _measure_conditions(args, data, drawing)
    else:
        _evaluate_model(args, data, drawing)


def parse_sweep(text: str | None) -> tuple[float, ...]:
    """`1,2,4,7`. Raises UserError for what is no number of 0 or more."""
    if text is None:
        return ()
    try:
        scales = tuple(float(part) for part in text.split(","))
    except ValueError:
        scales = (math.nan,)
    if not all(math.isfinite(scale) and scale >= 0 for scale in scales):
        raise UserError(f"--sweep: found {text!r}; allowed are numbers of 0 or more, such as 1,2,4,7")
    return tuple(dict.fromkeys(scales))


def _evaluate_model(args: argparse.Namespace, data: ReportData, drawing: Drawing) -> None:
    """Draw with every process, then measure with the first."""
    from ldm.data.sources import open_source
    from ldm.evaluation.report_data import told_scenes
    from ldm.evaluation.report_drawing import draw_all, told_for
    from ldm.evaluation.report_model import prepare
    from ldm.interchange.fingerprint import base_model_hash
    from ldm.interchange.opening import open_pipeline

    if args.trained and data.vocabulary is None:
        raise UserError(f"--trained: found data.source {data.config.source}; allowed is scenes; leave it out")
    with shared_work(args.device) as (share, device):
        pipeline = open_pipeline(args.model, dtype=args.dtype, device=device)
        side = min(pipeline.default_size)
        data = data.at(side)
        source = open_source(data.config)
        told = told_for(pipeline, data, source, drawing.count, drawing.seed)
        weights = base_model_hash(args.model)
        folder = args.out / IMAGES
        drawn = draw_all(pipeline, told, drawing, side, folder, share, weights)
        trained = None
        if args.trained and data.vocabulary is not None:
            seen = told_scenes(data.vocabulary, args.trained, drawing.seed, trained=True)
            trained = draw_all(pipeline, seen, replace(drawing, sweep=()), side, folder, share, weights)[""]
        if share.rank > 0:
            return
    measuring = replace(measuring_of(args, data), likelihood=args.likelihood, training_images=args.training_images)
    made = prepare(pipeline, data, source, drawn, measuring, args.out / CACHE, trained)
    _write_model_report(args, made, drawing, weights)
    if not args.keep_images:
        for one in drawn.values():
            one.folder.remove()


def _write_model_report(args: argparse.Namespace, made: Measured, drawing: Drawing, weights: str) -> None:
    from ldm.evaluation.report import Report
    from ldm.evaluation.report_data import prompts_of
    from ldm.evaluation.report_drawing import scheduler_for
    from ldm.evaluation.report_model import model_sections
    from ldm.evaluation.report_progress import extended_history, progress_section, write_history
    from ldm.evaluation.report_scenes import captioned, flat_scores
    from ldm.evaluation.report_training import run_sections
    from ldm.picture import grid, save_png

    held_out = "held-out combinations" if made.data.vocabulary is not None else f"captions of {made.data.name}"
    drawn_with = {name: getattr(args, name) for name in ("steps", "guidance", "seed")}
    drawn_with["scheduler"] = scheduler_for(made.pipeline, drawing.scheduler)
    settings = {
        "model": str(args.model),
        "kind": "diffusion",
        "prompts": held_out,
        **drawn_with,
        "count": drawing.count,
        "resolution": made.side,
        "data": made.data.name,
        "device": str(made.pipeline.device),
        "dtype": str(made.pipeline.dtype).removeprefix("torch."),
        "weights": weights,
    }
    sections = model_sections(made)
    training, curves = run_sections(args.model)
    sections += training
    history: list[dict[str, Any]] = []
    step = max((curve.steps[-1] for curve in curves.values()), default=None)
    if step is not None:
        seen = {name: extractor.weights for name, extractor in made.eyes.opened.items()}
        alike = {**drawn_with, "count": drawing.count, "data": made.data.name, "seen_through": seen}
        history = extended_history(args.out, step, alike, sections)
    progress = progress_section({n: c for n, c in curves.items() if n.startswith("watch/")}, history, sections)
    sections += [progress] if progress is not None else []
    report = Report(
        title=f"{args.model.resolve().name}: what it draws, and how well",
        subtitle=_subtitle(args.model, step, drawing.count, held_out),
        settings=settings,
        sections=tuple(sections),
    )
    report.write(args.out, flat_scores(made.scores) if made.scores else None)
    if history:
        write_history(args.out, history)
    count = min(SHOWN, len(made.main.told))
    captions = captioned(prompts_of(made.main.told[:count]), made.scores[:count])
    save_png(grid([made.main.picture(i) for i in range(count)], captions, columns=8), args.out / "grid.png")
    _tell(args.out, sections, made.scores)


def _evaluate_autoencoder(args: argparse.Namespace, folder: Path, data: ReportData) -> None:
    """Put images of the data through it and back."""
    from autoencoder.model import load_autoencoder, weights_hash
    from ldm.device import choose_device
    from ldm.evaluation.report import Report
    from ldm.evaluation.report_autoencoder import autoencoder_sections
    from ldm.evaluation.report_data import open_data
    from ldm.evaluation.report_training import run_sections

    if args.conditions or args.sweep or args.likelihood or args.trained:
        raise UserError(
            f"{args.model}: found an autoencoder; --conditions, --sweep, --likelihood and --trained are for models"
        )
    device = choose_device(args.device)
    with user_input("autoencoder"):
        autoencoder = load_autoencoder(folder).to(device).eval()
    data = data.at(args.resolution or data.config.resolution)
    count = args.count or RECONSTRUCTED
    measuring = replace(measuring_of(args, data), reconstructed=count)
    sections = autoencoder_sections(autoencoder, data, open_data(data.config), measuring)
    training, _ = run_sections(args.model)
    report = Report(
        title=f"{args.model.resolve().name}: what it keeps of an image",
        subtitle=f"{type(autoencoder).__name__} at {folder}, on {count} images at most of {data.name}",
        settings={
            "model": str(args.model),
            "kind": "autoencoder",
            "count": count,
            "seed": args.seed,
            "resolution": data.config.resolution,
            "data": data.name,
            "device": str(device),
            "weights": weights_hash(autoencoder),
        },
        sections=(*sections, *training),
    )
    report.write(args.out)
    _tell(args.out, report.sections, [])


def _tell(out: Path, sections: Sequence[Section], scores: Sequence[SceneScore]) -> None:
    """The verdicts, what is missing, and where it all is."""
    from ldm.evaluation.report import METRICS, PAGE
    from ldm.evaluation.report_scenes import describe
    from ldm.evaluation.scenes import rates

    if scores:
        print(describe(rates(scores)))
    for section in sections:
        if section.missing:
            print(f"{section.title} left out: {section.missing}", file=sys.stderr)
        elif section.verdict and section.name != "scene_scores":
            print(f"{section.title}: {section.verdict}")
    picture = f"   picture: {out / 'grid.png'}" if (out / "grid.png").is_file() else ""
    print(f"report: {out / PAGE}{picture}   figures: {out / METRICS}")


def _subtitle(model: Path, step: int | None, count: int, prompts: str) -> str:
    trained = "" if step is None else f", {step:,} updates"
    return f"{model}{trained}; {count} pictures from {prompts}"


def _measure_conditions(args: argparse.Namespace, data: ReportData, drawing: Drawing) -> None:
    """Measure each condition of the model, alone and together; write figures and pictures."""
    from ldm.canvas import InpaintingOptions
    from ldm.evaluation.conditions import measure_conditions
    from ldm.evaluation.drawing import PipelineDrawer
    from ldm.evaluation.report_drawing import scheduler_for
    from ldm.files import write_text
    from ldm.interchange.opening import open_pipeline
    from ldm.picture import save_png

    if data.vocabulary is None:
        raise UserError(
            f"--conditions: found data.source {data.config.source}; allowed is scenes, the only data whose pictures "
            "are measured exactly; leave it out, or name a config of scenes"
        )
    pipeline = open_pipeline(args.model, dtype=args.dtype, device=args.device)
    inpainting = InpaintingOptions(feather=data.config.resolution // 16)
    scheduler = scheduler_for(pipeline, drawing.scheduler)
    drawer = PipelineDrawer(pipeline, drawing.steps, drawing.guidance, scheduler, drawing.batch, inpainting=inpainting)
    count = args.count or CONDITIONS_COUNT
    report = measure_conditions(drawer, data.vocabulary, pipeline.conditions, count, args.seed, data.config.resolution)
    args.out.mkdir(parents=True, exist_ok=True)
    settings = {"steps": args.steps, "guidance": args.guidance, "scheduler": scheduler}
    figures = {"model": str(args.model), **settings, "feather": inpainting.feather, **report.as_dict()}
    write_text(args.out / "conditions.json", json.dumps(figures, indent=2) + "\n")
    save_png(report.pictures, args.out / "conditions.png")
    print(report.summary())
    print(f"picture: {args.out / 'conditions.png'}   figures: {args.out / 'conditions.json'}")

"""Lay several models, or several autoencoders, side by side: the same prompts and seeds, figures with intervals."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

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

COUNT, RECONSTRUCTED = 64, 256
"""Pictures of each model, images through each autoencoder, unless --count says otherwise."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `ldm compare`."""
    parser.add_argument(
        "models", type=Path, nargs="+", metavar="RUN_OR_MODEL", help="two or more runs, pipelines or autoencoders"
    )
    add_report_arguments(parser, COUNT)


def run(args: argparse.Namespace) -> None:
    """Check, draw with every model in turn, measure, write."""
    check_report(args)
    if len(args.models) < 2:
        raise UserError(f"found {len(args.models)} model; allowed are two or more; name what to compare it with")
    if len({path.resolve() for path in args.models}) < len(args.models):
        raise UserError("found the same model twice; allowed are different ones; name each once")
    drawing = drawing_of(args, COUNT)
    data = find_data(args.data, args.models[0])
    folders = [autoencoder_folder(path) for path in args.models]
    if any(folders) and not all(folders):
        raise UserError("found autoencoders beside models; allowed is one kind; compare them apart")
    if all(folders):
        _compare_autoencoders(args, [folder for folder in folders if folder is not None], data)
    else:
        _compare_models(args, data, drawing)


def labels_of(paths: Sequence[Path]) -> list[str]:
    """The last part of each path, or as many parts as it takes to tell them apart."""
    whole = [path.resolve().parts for path in paths]
    for length in range(1, max(map(len, whole)) + 1):
        labels = ["/".join(parts[-length:]) for parts in whole]
        if len(set(labels)) == len(labels):
            return labels
    raise UserError("found the same model twice; allowed are different ones; name each once")


def _compare_models(args: argparse.Namespace, data: ReportData, drawing: Drawing) -> None:
    from ldm.data.sources import open_source
    from ldm.evaluation.report_drawing import draw_all, told_for
    from ldm.evaluation.report_eyes import in_fp32
    from ldm.evaluation.report_models import measure_models
    from ldm.interchange.fingerprint import base_model_hash
    from ldm.interchange.opening import open_pipeline

    labels, drawn, told, autoencoder = labels_of(args.models), {}, None, None
    with shared_work(args.device) as (share, device):
        for number, (label, path) in enumerate(zip(labels, args.models, strict=True)):
            pipeline = open_pipeline(path, dtype=args.dtype, device=device)
            if told is None or autoencoder is None:
                side = min(pipeline.default_size)
                data, autoencoder = data.at(side), in_fp32(pipeline.vae)
                source = open_source(data.config)
                told = told_for(pipeline, data, source, drawing.count, drawing.seed)
            if min(pipeline.default_size) != side:
                raise UserError(
                    f"{path}: found a model of {min(pipeline.default_size)} px beside one of {side} px; allowed is one "
                    "size, or figures would not be comparable"
                )
            folder = args.out / IMAGES / f"{number}-{path.resolve().name}"
            drawn[label] = draw_all(pipeline, told, drawing, side, folder, share, base_model_hash(path))[""]
            del pipeline  # one model at a time in memory
        if share.rank > 0:
            return
    sections = measure_models(drawn, data, source, measuring_of(args, data), autoencoder, args.out / CACHE)
    _write(args, labels, data, sections, f"{drawing.count} pictures of each, from the same prompts and seeds")
    if not args.keep_images:
        for one in drawn.values():
            one.folder.remove()
        if not any((args.out / IMAGES).iterdir()):
            (args.out / IMAGES).rmdir()


def _compare_autoencoders(args: argparse.Namespace, folders: Sequence[Path], data: ReportData) -> None:
    from dataclasses import replace

    from autoencoder.model import load_autoencoder
    from ldm.device import choose_device
    from ldm.evaluation.report_data import open_data
    from ldm.evaluation.report_models import measure_autoencoders

    data = data.at(data.config.resolution)
    device = choose_device(args.device)
    with user_input("autoencoder"):
        loaded = [load_autoencoder(folder).to(device).eval() for folder in folders]
    labels = labels_of(args.models)
    measuring = replace(measuring_of(args, data), reconstructed=args.count or RECONSTRUCTED)
    sections = measure_autoencoders(dict(zip(labels, loaded, strict=True)), data, open_data(data.config), measuring)
    _write(args, labels, data, sections, f"the same {measuring.reconstructed} images at most of {data.name}")


def _write(
    args: argparse.Namespace, labels: Sequence[str], data: ReportData, sections: Sequence[Section], subtitle: str
) -> None:
    from ldm.evaluation.report import METRICS, PAGE, Report, attempt
    from ldm.evaluation.report_training import METRICS_LOG, compared_training_section, read_curves

    logged = [(label, path) for label, path in zip(labels, args.models, strict=True) if (path / METRICS_LOG).is_file()]
    curves = {label: read_curves(path) for label, path in logged}
    training = [attempt("training", "Training", lambda: compared_training_section(curves))] if curves else []
    settings = {name: getattr(args, name) for name in ("steps", "guidance", "seed")}
    settings["scheduler"] = args.scheduler or "ddim, for a flow model euler"
    report = Report(
        title=" against ".join(labels),
        subtitle=subtitle,
        settings={"models": [str(path) for path in args.models], "labels": list(labels), **settings, "data": data.name},
        sections=(*sections, *training),
    )
    report.write(args.out)
    for section in report.sections:
        if section.missing:
            print(f"{section.title} left out: {section.missing}", file=sys.stderr)
        elif section.verdict:
            print(f"{section.title}: {section.verdict}")
    print(f"report: {args.out / PAGE}   figures: {args.out / METRICS}")

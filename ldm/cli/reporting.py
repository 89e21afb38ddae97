"""What `ldm evaluate` and `ldm compare` share: their options, the data they name, the processes they run on."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ldm.cli.entry import check_out_folder
from ldm.errors import UserError, user_input

if TYPE_CHECKING:
    from ldm.data.share import Share
    from ldm.data.sources import DataConfig
    from ldm.evaluation.extractors import ExtractorConfig
    from ldm.evaluation.report_data import ReportData
    from ldm.evaluation.report_drawing import Drawing
    from ldm.evaluation.report_model import Measuring

IMAGES, CACHE = "images", "reference"
"""Folders below --out: the pictures that are drawn, statistics of the data."""
RESOLUTION = 256
"""Pixels of an autoencoder's images where no config says otherwise; a model has a size of its own."""
AUTOENCODERS = ("AutoencoderKL", "VQModel")


def add_report_arguments(parser: argparse.ArgumentParser, count: int) -> None:
    """Options of every report; `count` is how many pictures are drawn by default."""
    parser.add_argument(
        "--data",
        type=Path,
        metavar="CONFIG|FOLDER",
        help="a config whose validation_data (or data) to compare with, or a folder of images (a run has its own)",
    )
    parser.add_argument("--count", type=int, metavar="N", help=f"pictures to draw, or images to measure ({count})")
    parser.add_argument("--steps", type=int, default=25, help="denoising steps (default 25)")
    parser.add_argument(
        "--guidance", default="4", metavar="SCALE", help="one number, or text=4,semantic=2,... (default 4)"
    )
    parser.add_argument(
        "--scheduler", help="ddpm, ddim, euler, heun, dpm++ or unipc (default ddim, for a flow model euler)"
    )
    parser.add_argument("--batch", type=int, default=64, help="pictures drawn at once (default 64)")
    parser.add_argument("--seed", type=int, default=0, help="picture i is drawn from seed + i (default 0)")
    parser.add_argument(
        "--extractor",
        action="append",
        default=[],
        metavar="KIND[:ARCHITECTURE][=FILE]",
        help="what to see images through; repeatable: autoencoder, scenes, inception=FILE, openclip:ViT-B-32=FILE, "
        "timm:resnet50=FILE (default: the model's own autoencoder, the scenes' scorer, and inception if it is there)",
    )
    parser.add_argument("--download", action="store_true", help="fetch the weights of extractors named without a FILE")
    parser.add_argument("--lpips-weights", metavar="FILE", help="torchvision's VGG16 weights as .safetensors")
    parser.add_argument(
        "--reference", type=int, default=10_000, metavar="N", help="images compared with at most (default 10000)"
    )
    parser.add_argument("--keep-images", action="store_true", help="keep every picture in OUT/images")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto", help="auto, fp32, bf16 or fp16")
    parser.add_argument("--out", type=Path, required=True, help="folder for report.html, metrics.json, grid.png")


def check_report(args: argparse.Namespace, *counts: str) -> None:
    """Raise UserError for options that cannot be, before anything is read; `counts` are further ones of 1 or more."""
    from ldm.sampling import check_scheduler_name

    for name in ("count", "steps", "batch", "reference", *counts):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')}: found {value}; allowed is 1 or more")
    for text in args.extractor:
        parse_extractor(text)
    if args.seed < 0:
        raise UserError(f"--seed: found {args.seed}; allowed is 0 or more")
    if args.scheduler is not None:
        check_scheduler_name(args.scheduler)
    check_out_folder(args.out)


def drawing_of(args: argparse.Namespace, count: int, sweep: tuple[float, ...] = (), sweep_count: int = 1) -> Drawing:
    """How to draw; raises UserError for an impossible guidance scale."""
    from ldm.evaluation.report_drawing import Drawing
    from ldm.guidance import parse_guidance_scale

    return Drawing(
        count=args.count or count,
        steps=args.steps,
        guidance=parse_guidance_scale(args.guidance),
        scheduler=args.scheduler,
        batch=args.batch,
        seed=args.seed,
        sweep=sweep,
        sweep_count=sweep_count,
    )


def measuring_of(args: argparse.Namespace, data: ReportData) -> Measuring:
    """What to measure."""
    from ldm.evaluation.report_model import Measuring

    extractors = tuple(parse_extractor(text, args.download) for text in args.extractor or default_extractors(data))
    return Measuring(extractors=extractors, seed=args.seed, reference=args.reference, lpips_weights=args.lpips_weights)


def default_extractors(data: ReportData) -> list[str]:
    """The model's own autoencoder, which is always there; Inception is tried, and told of where it is not."""
    return ["autoencoder", *(["scenes"] if data.vocabulary is not None else []), "inception"]


def parse_extractor(text: str, download: bool = False) -> ExtractorConfig:
    """`inception=FILE`, `openclip:ViT-B-32=FILE`, `autoencoder`, ... Raises UserError."""
    from ldm.evaluation.extractors import ExtractorConfig

    named, _, weights = text.partition("=")
    kind, _, architecture = named.partition(":")
    with user_input(f"--extractor {text}", ValueError):
        return ExtractorConfig(
            kind=kind,  # type: ignore[arg-type]
            architecture=architecture or None,
            weights=weights or None,
            download=download,
        )


def find_data(given: Path | None, model: Path) -> ReportData:
    """The data that `--data` names, else those of the run `model`. Raises UserError."""
    from ldm.evaluation.report_data import ReportData, data_of_folder

    own = model / "config.yaml"
    trained_on = _section(own, "data") if own.is_file() else None
    path = given or own
    if path.is_dir() and not (path / "config.yaml").is_file():
        resolution = trained_on.resolution if trained_on is not None else RESOLUTION
        return data_of_folder(path, resolution, training=trained_on)
    path = path / "config.yaml" if path.is_dir() else path
    if not path.is_file():
        raise UserError(
            f"{path}: no such config; give a run folder, or --data CONFIG or FOLDER beside a pipeline or an autoencoder"
        )
    data, validation = _section(path, "data"), _section(path, "validation_data")
    chosen = validation or data
    if chosen is None:
        raise UserError(f"config {path}: found no section 'data'; add one, or name a folder of images")
    training = trained_on or data
    held_out = validation is not None or (training is not None and training != chosen)
    vocabulary = (data if data is not None and data.source == "scenes" else chosen).scenes
    return ReportData(
        name=f"{'validation_data' if validation else 'data'} of {path}{'' if held_out else ' (training images)'}",
        config=chosen,
        vocabulary=vocabulary if chosen.source == "scenes" else None,
        training=training,
        held_out=held_out,
    )


def autoencoder_folder(path: Path) -> Path | None:
    """The autoencoder that `path` is, or that the run `path` made; None if it is something else."""
    import json

    for folder in (path / "autoencoder", path):
        config = folder / "config.json"
        if config.is_file():
            with user_input(f"{config}", OSError, ValueError):
                values = json.loads(config.read_text(encoding="utf-8"))
            if isinstance(values, dict) and values.get("_class_name") in AUTOENCODERS:
                return folder
    return None


@contextmanager
def shared_work(device: str) -> Iterator[tuple[Share, str]]:
    """This process's share of the work and its device, where accelerate or torchrun has started several processes."""
    from ldm.data.share import Share

    if "LOCAL_RANK" not in os.environ or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Share(), device
        return
    from datetime import timedelta

    from accelerate import PartialState

    from ldm.device import choose_device

    state = PartialState(cpu=choose_device(device).type == "cpu", timeout=timedelta(hours=6))
    try:
        chosen = str(state.device) if device == "auto" else device
        yield Share(state.process_index, state.num_processes, state.wait_for_everyone), chosen
    finally:
        state.destroy_process_group()


def _section(path: Path, name: str) -> DataConfig | None:
    """A data section of a config; None if it is left out or null."""
    import yaml

    from ldm.config import load_section
    from ldm.data.sources import DataConfig

    with user_input(f"config {path}", OSError, ValueError, yaml.YAMLError):
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(values, dict) or values.get(name) is None:
        return None
    return load_section(DataConfig, path, name)

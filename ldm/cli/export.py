"""Write a model in the form that another program opens: a diffusers folder, a single file, a LoRA."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ldm.errors import UserError

KINDS = ("diffusers", "single-file", "lora", "kohya-lora")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `ldm export`."""
    parser.add_argument(
        "model", type=Path, metavar="MODEL", help="pipeline folder, run, single file, hub id, or a LoRA or its run"
    )
    parser.add_argument("--to", required=True, choices=KINDS, help="what to write")
    parser.add_argument("--out", type=Path, required=True, metavar="PATH", help="folder, or file (.safetensors)")
    parser.add_argument("--base", metavar="MODEL", help="the model that a LoRA file changes (a run names its own)")
    parser.add_argument("--dtype", default="fp32", help="fp32, fp16 or bf16 (default: fp32)")
    parser.add_argument("--title", help="for the model card or the file's header (default: the name)")
    parser.add_argument("--license", help="the same")
    parser.add_argument(
        "--standard-scale",
        action="store_true",
        help="put the latent scale into the weights, for ComfyUI and A1111, which assume 0.18215",
    )
    parser.add_argument("--prediction", help="epsilon, v_prediction or sample, where a single file does not say it")
    parser.add_argument("--allow-pickle", action="store_true", help="read a .ckpt, which is a pickle")


def run(arguments: argparse.Namespace) -> None:
    """Convert, and say on stderr what other programs would not recognise."""
    from ldm.device import DTYPES

    if arguments.dtype not in DTYPES:
        raise UserError(f"--dtype: found {arguments.dtype!r}; allowed is {', '.join(DTYPES)}")
    if arguments.to in ("lora", "kohya-lora"):
        _export_lora(arguments)
    elif arguments.base is not None:
        raise UserError(f"--base: found with --to {arguments.to}; it goes with lora and kohya-lora; leave it out")
    else:
        _export_model(arguments)
    print(arguments.out)


def _export_model(arguments: argparse.Namespace) -> None:
    from ldm.errors import user_input
    from ldm.interchange.export import export
    from ldm.interchange.hints import Hints

    said = {"title": arguments.title, "license": arguments.license}
    with user_input("--prediction"):
        hints = Hints(prediction=arguments.prediction)
    warnings = export(
        arguments.model,
        arguments.out,
        arguments.to,
        arguments.dtype,
        metadata={name: value for name, value in said.items() if value},
        standard_scale=arguments.standard_scale,
        allow_pickle=arguments.allow_pickle,
        hints=hints,
    )
    for warning in warnings:
        print(f"ldm export: {warning}", file=sys.stderr)


def _export_lora(arguments: argparse.Namespace) -> None:
    """Write a LoRA file, or the one of a run, in the layout asked for; the model that it changes names the layers."""
    from ldm.adapter_layers import plain_layers
    from ldm.device import DTYPES
    from ldm.interchange.opening import read_model
    from ldm.lora_files import LoraKind, save_lora
    from ldm.lora_reading import read_lora

    inside = arguments.model / "lora.safetensors"
    base = read_model(arguments.base or _base_of(arguments.model), allow_pickle=arguments.allow_pickle)
    text_layers = plain_layers(base.text_encoder.model) if base.text_encoder is not None else {}
    lora = read_lora(inside if inside.is_file() else arguments.model, plain_layers(base.unet), text_layers)
    kind: LoraKind = "kohya" if arguments.to == "kohya-lora" else "diffusers"
    save_lora(arguments.out, lora, kind=kind, dtype=DTYPES[arguments.dtype])


def _base_of(run: Path) -> str:
    """The model that a run trained a LoRA for. Raises UserError for a LoRA that is not in its run."""
    import yaml

    config = run / "config.yaml"
    if not config.is_file():
        raise UserError(f"{run}: found no config.yaml that names the model it changes; give it with --base MODEL")
    base = yaml.safe_load(config.read_text(encoding="utf-8")).get("model")
    if base is None:
        raise UserError(f"{run}: found no LoRA, its run trained a whole model; give the run of a LoRA, or --base MODEL")
    return str(base)

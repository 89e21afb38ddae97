"""Write a model in the form that another program opens: a diffusers folder, a single file, a LoRA."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ldm.errors import UserError

KINDS = ("diffusers", "single-file", "lora", "kohya-lora")
_OF_MODELS = ("vae", "lora", "standard_scale", "prediction", "variant")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `ldm export`."""
    parser.add_argument(
        "model", type=Path, metavar="MODEL", help="pipeline folder, run, single file, hub id, or a LoRA or its run"
    )
    parser.add_argument("--to", required=True, choices=KINDS, help="what to write")
    parser.add_argument("--out", type=Path, required=True, metavar="PATH", help="folder, or file (.safetensors)")
    parser.add_argument("--overwrite", action="store_true", help="replace what is there")
    parser.add_argument("--base", metavar="MODEL", help="the model that a LoRA file changes (a run names its own)")
    parser.add_argument(
        "--lora",
        action="append",
        default=[],
        metavar="PATH[=W]",
        help="merge a LoRA, a file or its run, with this weight (1) into the model; repeatable",
    )
    parser.add_argument("--vae", type=Path, metavar="PATH", help="another autoencoder: folder, or file of one alone")
    parser.add_argument("--dtype", default="fp32", help="fp32, fp16 or bf16 (default: fp32)")
    parser.add_argument("--title", help="for the model card or the file's header (default: the name)")
    parser.add_argument("--license", help="the same")
    parser.add_argument(
        "--standard-scale",
        action="store_true",
        help="put the latent scale into the weights, for ComfyUI and A1111, which assume 0.18215",
    )
    parser.add_argument("--prediction", help="epsilon, v_prediction or sample, where a single file does not say it")
    parser.add_argument("--variant", metavar="NAME", help="which weights of a folder, such as fp16")
    parser.add_argument("--allow-pickle", action="store_true", help="read a .ckpt, which is a pickle")


def run(arguments: argparse.Namespace) -> None:
    """Convert, and say on stderr what other programs would not recognise."""
    is_lora = arguments.to in ("lora", "kohya-lora")
    misplaced = [name for name in (_OF_MODELS if is_lora else ("base",)) if getattr(arguments, name)]
    if misplaced:
        fitting = "diffusers and single-file" if is_lora else "lora and kohya-lora"
        option = f"--{misplaced[0].replace('_', '-')}"
        raise UserError(f"{option}: found with --to {arguments.to}; it goes with {fitting}; leave it out")
    for warning in _export_lora(arguments) if is_lora else _export_model(arguments):
        print(f"ldm export: {warning}", file=sys.stderr)
    print(arguments.out)


def _export_model(arguments: argparse.Namespace) -> list[str]:
    from ldm.cli.drawing import parse_lora
    from ldm.errors import user_input
    from ldm.interchange.export import export
    from ldm.interchange.hints import Hints

    said = {"title": arguments.title, "license": arguments.license}
    with user_input("--prediction"):
        hints = Hints(prediction=arguments.prediction)
    return export(
        arguments.model,
        arguments.out,
        arguments.to,
        arguments.dtype,
        metadata={name: value for name, value in said.items() if value},
        standard_scale=arguments.standard_scale,
        loras=[parse_lora(text) for text in arguments.lora],
        vae=arguments.vae,
        overwrite=arguments.overwrite,
        allow_pickle=arguments.allow_pickle,
        variant=arguments.variant,
        hints=hints,
    )


def _export_lora(arguments: argparse.Namespace) -> list[str]:
    from ldm.interchange.lora_export import export_lora

    return export_lora(
        arguments.model,
        arguments.out,
        "kohya" if arguments.to == "kohya-lora" else "diffusers",
        arguments.dtype,
        base=arguments.base,
        title=arguments.title,
        license=arguments.license,
        overwrite=arguments.overwrite,
        allow_pickle=arguments.allow_pickle,
    )

"""The options by which the drawing commands do with less memory, and choose the attention kernel."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from ldm.errors import UserError

if TYPE_CHECKING:
    from ldm.pipeline import LatentDiffusionPipeline

KERNELS = ("auto", "sdpa", "xformers", "math")


def add_memory_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare them."""
    parser.add_argument("--attention", choices=KERNELS, default="auto", help="attention kernel (default: auto, sdpa)")
    parser.add_argument("--vae-slicing", action="store_true", help="decode a batch's pictures one by one")
    parser.add_argument(
        "--vae-tiling",
        nargs="?",
        type=int,
        const=0,
        metavar="N",
        help="decode larger pictures in tiles of N pixels (the autoencoder's own size); colours may differ a little",
    )
    parser.add_argument(
        "--attention-slicing", action="store_true", help="compute attention for half of the heads at a time"
    )
    parser.add_argument(
        "--offload", action="store_true", help="keep each part of the model on the GPU only while it works"
    )


def memory_facts(arguments: argparse.Namespace) -> dict[str, object]:
    """What of these options changes the picture, for its file. Raises UserError for options that exclude each other."""
    if arguments.attention_slicing and arguments.attention != "auto":
        raise UserError(
            f"--attention-slicing: found with --attention {arguments.attention}; it is a kernel of its own; give one"
        )
    if arguments.vae_tiling is None:
        return {}
    return {"VAE tiling": arguments.vae_tiling or "on"}


def opening_device(arguments: argparse.Namespace) -> tuple[str, str]:
    """Where to open the model, and in which type it is to compute, as names. Raises UserError."""
    if not arguments.offload:
        return arguments.device, arguments.dtype

    from ldm.device import DTYPES, choose_device, choose_dtype

    device = choose_device(arguments.device)
    if device.type == "cpu":
        raise UserError("--offload: found no GPU to send parts of the model to; leave it out")
    dtype = choose_dtype(arguments.dtype, device)
    return "cpu", next(name for name, known in DTYPES.items() if known == dtype)


def save_memory(pipeline: LatentDiffusionPipeline, arguments: argparse.Namespace) -> None:
    """Set what the options ask for; with `--verbose` tell which attention kernel really runs. Raises UserError."""
    from ldm.attention import set_attention

    if arguments.attention != "auto":
        set_attention(pipeline.unet, arguments.attention)
    if arguments.attention_slicing:
        pipeline.enable_attention_slicing()
    if arguments.vae_slicing:
        pipeline.enable_vae_slicing()
    if arguments.vae_tiling is not None:
        pipeline.enable_vae_tiling(arguments.vae_tiling or None)
    if arguments.offload:
        pipeline.enable_model_cpu_offload(arguments.device)
    if arguments.verbose:
        _tell_kernel(pipeline)


def _tell_kernel(pipeline: LatentDiffusionPipeline) -> None:
    import torch

    from ldm.attention import attention_that_ran

    with torch.no_grad():
        print(f"attention: {attention_that_ran(pipeline.unet)}", file=sys.stderr)

"""A trained or loaded model into the form that another program opens."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, get_args

import torch
from diffusers import AutoencoderKL
from torch import nn

from autoencoder.latents import fold_normalisation
from ldm.device import DTYPES
from ldm.errors import UserError, user_input
from ldm.interchange.architecture import STANDARD_SCALING_FACTOR
from ldm.interchange.hints import Hints
from ldm.interchange.model_card import write_model_card
from ldm.interchange.single_file import NO_HINTS, read_single_file
from ldm.interchange.single_file_writer import write_single_file
from ldm.pipeline_folder import Components, find_folder, read_components, write_components

Kind = Literal["diffusers", "single-file"]


def export(
    source: str | Path,
    out: str | Path,
    kind: Kind,
    dtype: str | torch.dtype = "fp32",
    *,
    metadata: Mapping[str, str] | None = None,
    standard_scale: bool = False,
    allow_pickle: bool = False,
    hints: Hints = NO_HINTS,
) -> list[str]:
    """Write the model at `source` to `out`, and return what the user should be warned of, a line each.

    `source` is a pipeline's folder, a run's folder with one in it, a hub id, or a single file (`allow_pickle` and
    `hints` as in `read_single_file`). `diffusers` writes a folder with a model card, `single-file` a .safetensors file
    in Stable Diffusion's layout (`metadata` as in `write_single_file`). `dtype` is fp32, fp16 or bf16.
    `standard_scale` puts the latent scale into the autoencoder's weights so that its factor is 0.18215, which ComfyUI
    and A1111 assume: the same images up to rounding, other weights.

    Raises UserError; then nothing at `out` has changed.
    """
    precision = _precision(dtype)
    if kind not in get_args(Kind):
        raise UserError(f"kind: found {kind!r}; allowed is {', '.join(get_args(Kind))}")
    components, run = _read(Path(source), allow_pickle, hints)
    if standard_scale:
        with user_input("standard_scale", ValueError):
            components = with_standard_scale(components)
    if kind == "single-file":
        return write_single_file(components, out, dtype=precision, metadata=metadata)
    _cast(components, precision)
    write_components(components, out)
    write_model_card(out, title=(metadata or {}).get("title"), run=run, license=(metadata or {}).get("license"))
    return []


def with_standard_scale(components: Components) -> Components:
    """The same model with Stable Diffusion's latent factor 0.18215, the rest of the scale put into the weights.

    The parts are shared but for the autoencoder, which is a copy. Raises ValueError for one that cannot be folded.
    """
    if not isinstance(components.vae, AutoencoderKL):
        raise ValueError(f"found a {type(components.vae).__name__}; allowed is AutoencoderKL")
    config = components.vae.config
    if config.get("shift_factor") or config.get("latents_mean"):
        raise ValueError("found an autoencoder that shifts its latents; allowed is a scaling_factor alone")
    vae = copy.deepcopy(components.vae)
    channels = config.latent_channels
    # What the U-Net sees stays: factor * z = 0.18215 * z', so z' = z / (0.18215 / factor).
    std = torch.full((channels,), STANDARD_SCALING_FACTOR / config.scaling_factor)
    fold_normalisation(vae, torch.zeros(channels), std)
    vae.register_to_config(scaling_factor=STANDARD_SCALING_FACTOR)
    return Components(
        vae,
        components.unet,
        components.noise_scheduler,
        components.text_encoder,
        components.semantic_encoder,
        components.label_encoder,
    )


def _precision(dtype: str | torch.dtype) -> torch.dtype:
    for name, known in DTYPES.items():
        if dtype in (name, known):
            return known
    raise UserError(f"dtype: found {dtype}; allowed is {', '.join(DTYPES)}")


def _read(source: Path, allow_pickle: bool, hints: Hints) -> tuple[Components, Path]:
    """The model, and the folder that it lies in, which may be that of the run that made it."""
    if source.is_file():
        return read_single_file(source, allow_pickle=allow_pickle, hints=hints), source.parent
    if (source / "pipeline" / "model_index.json").is_file():
        source = source / "pipeline"
    folder = find_folder(source)
    return read_components(folder), folder.resolve().parent


def _cast(components: Components, dtype: torch.dtype) -> None:
    encoders = (components.text_encoder, components.semantic_encoder, components.label_encoder)
    for network in (components.vae, components.unet, *encoders):
        if network is not None:
            nn.Module.to(network, dtype=dtype)  # diffusers' own `to` warns about an empty list of modules
            for name, weight in network.named_parameters():
                if dtype == torch.float16 and not weight.isfinite().all():
                    raise UserError(f"export: found {name} beyond float16's range; allowed is bf16 or fp32; choose one")

"""A trained or loaded model into the form that another program opens."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal, get_args

import torch
from diffusers import AutoencoderKL
from torch import nn

from autoencoder.latents import fold_normalisation
from ldm.device import DTYPES
from ldm.errors import UserError, user_input
from ldm.interchange.architecture import STANDARD_SCALING_FACTOR
from ldm.interchange.hints import NO_HINTS, Hints
from ldm.interchange.model_card import write_model_card
from ldm.interchange.opening import is_single_file, merge_loras, model_folder, read_model
from ldm.interchange.single_file_writer import write_single_file
from ldm.lora_reading import checked_lora, lora_name
from ldm.pipeline_folder import Components, new_pipeline, write_parts

Kind = Literal["diffusers", "single-file"]


def export(
    source: str | Path,
    out: str | Path,
    kind: Kind,
    dtype: str | torch.dtype = "fp32",
    *,
    metadata: Mapping[str, str] | None = None,
    standard_scale: bool = False,
    loras: Sequence[tuple[str | Path, float]] = (),
    vae: str | Path | None = None,
    overwrite: bool = False,
    allow_pickle: bool = False,
    variant: str | None = None,
    hints: Hints = NO_HINTS,
) -> list[str]:
    """Write the model at `source` to `out`, and return what the user should be warned of, a line each.

    `source` is a pipeline's folder, a run's folder with one in it, a hub id, or a single file; `vae`, `allow_pickle`,
    `variant` and `hints` are as in `read_model`, `loras` (file or run, weight) are merged into the weights. `diffusers`
    writes a folder with a model card, `single-file` a .safetensors file in Stable Diffusion's layout (`metadata` as in
    `write_single_file`). `dtype` is fp32, fp16 or bf16. `standard_scale` puts the latent scale into the autoencoder's
    weights so that its factor is 0.18215, which ComfyUI and A1111 assume: the same images up to rounding, other
    weights. What lies at `out` is replaced with `overwrite` only.

    Raises UserError; then nothing at `out` has changed.
    """
    precision = precision_of(dtype)
    if kind not in get_args(Kind):
        raise UserError(f"kind: found {kind!r}; allowed is {', '.join(get_args(Kind))}")
    check_new(out, overwrite)
    files = [(checked_lora(lora), weight) for lora, weight in loras]
    said = dict(metadata or {})
    components = read_model(source, allow_pickle=allow_pickle, variant=variant, vae=vae, hints=hints)
    merge_loras(components, files)
    if standard_scale:
        with user_input("standard_scale", ValueError):
            components = with_standard_scale(components)
    if kind == "single-file":
        if files:
            names = [Path(source).stem, *(f"{lora_name(file)} ({weight:g})" for file, weight in files)]
            said = {"merged_from": ", ".join(names), **said}
        return write_single_file(components, out, dtype=precision, metadata=said)
    _cast(components, precision)
    with new_pipeline(out) as partial:
        write_parts(components, partial)
        write_model_card(
            partial,
            name=Path(out).resolve().name,
            title=said.get("title"),
            run=_home_of(Path(source), variant),
            license=said.get("license"),
            merged=[(lora_name(file), weight) for file, weight in files],
        )
    return []


def check_new(out: str | Path, overwrite: bool) -> None:
    """Raise UserError when there is something at `out` that may not be replaced; an empty folder is nothing."""
    out = Path(out)
    if overwrite or not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    raise UserError(
        f"{out}: found something there already; allowed is a new name; give one, or --overwrite (overwrite=True)"
    )


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
    return replace(components, vae=vae)


def precision_of(dtype: str | torch.dtype) -> torch.dtype:
    """The type called `dtype`. Raises UserError."""
    for name, known in DTYPES.items():
        if dtype in (name, known):
            return known
    raise UserError(f"dtype: found {dtype}; allowed is {', '.join(DTYPES)}")


def _home_of(source: Path, variant: str | None) -> Path:
    """The folder that a model lies in, which may be that of the run that made it."""
    return (source if is_single_file(source) else model_folder(source, variant)).resolve().parent


def _cast(components: Components, dtype: torch.dtype) -> None:
    encoders = (components.text_encoder, components.semantic_encoder, components.label_encoder)
    for network in (components.vae, components.unet, *encoders):
        if network is not None:
            nn.Module.to(network, dtype=dtype)  # diffusers' own `to` warns about an empty list of modules
            for name, weight in network.named_parameters():
                if dtype == torch.float16 and not weight.isfinite().all():
                    raise UserError(f"export: found {name} beyond float16's range; allowed is bf16 or fp32; choose one")

"""Any model that we read, by its path: a pipeline's folder, a run, a hub id, or a single file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from autoencoder.model import Autoencoder, latent_channels, load_autoencoder
from ldm.device import choose_device, choose_dtype
from ldm.errors import UserError, user_input
from ldm.interchange.embedding_file import load_embedding
from ldm.interchange.hints import NO_HINTS, Hints
from ldm.interchange.single_file import read_autoencoder_file, read_single_file
from ldm.lora_reading import checked_lora, lora_name
from ldm.pipeline import LatentDiffusionPipeline
from ldm.pipeline_folder import Components, find_folder, read_components
from ldm.pipeline_weights import BROKEN, check_files, quiet_libraries

SINGLE_FILES = (".safetensors", ".ckpt")


def read_model(
    path: str | Path,
    *,
    allow_pickle: bool = False,
    variant: str | None = None,
    vae: str | Path | None = None,
    hints: Hints = NO_HINTS,
) -> Components:
    """The parts of a model, float32. Raises UserError.

    A `.ckpt` is a pickle and opens with `allow_pickle` only; `hints` are for single files. `variant` chooses among the
    files of a folder or a hub's repository, as `fp16` does `*.fp16.safetensors`. `vae` is an autoencoder in place of
    the model's own: its folder, a model's, or a file of one alone.
    """
    path = Path(path)
    if is_single_file(path):
        if variant is not None:
            raise UserError(f"variant: found {variant!r} with the single file {path}; allowed is none; leave it out")
        components = read_single_file(path, allow_pickle=allow_pickle, hints=hints)
    else:
        components = read_components(model_folder(path, variant), variant=variant)
    if vae is None:
        return components
    autoencoder = _read_autoencoder(Path(vae), allow_pickle)
    wanted, found = latent_channels(components.vae), latent_channels(autoencoder)
    if found != wanted:
        raise UserError(f"vae: found {vae} with {found} latent channels; allowed with {path} is {wanted}")
    return replace(components, vae=autoencoder)


def is_single_file(path: Path) -> bool:
    """Whether a file is meant, be it there or not."""
    return path.is_file() or (path.suffix in SINGLE_FILES and not path.is_dir())


def model_folder(path: str | Path, variant: str | None = None) -> Path:
    """The folder of a pipeline at `path`: it itself, that in a run, or the hub's. Raises UserError."""
    inside = Path(path) / "pipeline"
    return inside if (inside / "model_index.json").is_file() else find_folder(path, variant)


def open_pipeline(
    path: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    allow_pickle: bool = False,
    variant: str | None = None,
    vae: str | Path | None = None,
    loras: Sequence[tuple[str | Path, float]] = (),
    embeddings: Sequence[tuple[str | Path, str | None]] = (),
) -> LatentDiffusionPipeline:
    """`LatentDiffusionPipeline.from_pretrained` for single files and runs too, with LoRAs (file, weight) merged.

    A LoRA is a file, a run that made one, or a folder that diffusers saved one in, and so is an embedding (file, word
    or None for its own) of textual inversion; all else is as in `read_model`.
    """
    device = choose_device(device)
    dtype = choose_dtype(dtype, device)  # what is not there is told before any file is read
    files = [(checked_lora(lora), weight) for lora, weight in loras]
    name = Path(path).stem if is_single_file(Path(path)) else Path(path).resolve().name
    parts = read_model(path, allow_pickle=allow_pickle, variant=variant, vae=vae)
    merge_loras(parts, files)
    for file, word in embeddings:
        load_embedding(parts.text_encoder, file, word, allow_pickle=allow_pickle)
    name = " + ".join([name, *(f"{lora_name(file)}:{weight:g}" for file, weight in files)])
    return LatentDiffusionPipeline.from_components(parts, name=name, dtype=dtype, device=device)


def merge_loras(parts: Components, loras: Sequence[tuple[str | Path, float]]) -> None:
    """Add the LoRAs to the weights for good, in fp32, where small changes are not rounded away. Raises UserError."""
    if not loras:
        return
    from ldm.adapter_layers import bake  # here, as peft takes seconds to import
    from ldm.adapters import load_lora

    text_model = parts.text_encoder.model if parts.text_encoder is not None else None
    for number, (file, weight) in enumerate(loras):
        load_lora(parts.unet, text_model, file, weight, name=f"lora{number}")
    bake(parts.unet, text_model)


def _read_autoencoder(path: Path, allow_pickle: bool) -> Autoencoder:
    if is_single_file(path):
        return read_autoencoder_file(path, allow_pickle=allow_pickle)
    inside = [folder for folder in (path / "vae", path / "pipeline" / "vae", path / "autoencoder") if folder.is_dir()]
    folder = inside[0] if inside else path
    if folder.is_dir():
        check_files(folder, [""])
    with user_input("vae", *BROKEN), quiet_libraries():
        return load_autoencoder(str(folder))

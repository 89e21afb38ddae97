"""Any model that we read, by its path: a pipeline's folder, a run, a hub id, or a single file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from ldm.device import choose_device, choose_dtype
from ldm.interchange.single_file import read_single_file
from ldm.pipeline import LatentDiffusionPipeline
from ldm.pipeline_folder import Components, find_folder, read_components

SINGLE_FILES = (".safetensors", ".ckpt")


def read_model(path: str | Path, *, allow_pickle: bool = False) -> Components:
    """The parts of a model. A `.ckpt` is a pickle and opens with `allow_pickle` only. Raises UserError."""
    path = Path(path)
    if path.suffix in SINGLE_FILES and not path.is_dir():
        return read_single_file(path, allow_pickle=allow_pickle)
    run = path / "pipeline"
    return read_components(run if (run / "model_index.json").is_file() else find_folder(path))


def open_pipeline(
    path: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    allow_pickle: bool = False,
    loras: Sequence[tuple[Path, float]] = (),
) -> LatentDiffusionPipeline:
    """`LatentDiffusionPipeline.from_pretrained` for single files and runs too, with LoRAs (file, weight) merged."""
    device = choose_device(device)
    dtype = choose_dtype(dtype, device)  # what is not there is told before any file is read
    name = Path(path).stem if Path(path).suffix in SINGLE_FILES else Path(path).resolve().name
    parts = read_model(path, allow_pickle=allow_pickle)
    if loras:
        _merge(parts, loras)
        name = " + ".join([name, *(f"{file.stem}:{weight:g}" for file, weight in loras)])
    return LatentDiffusionPipeline.from_components(parts, name=name, dtype=dtype, device=device)


def _merge(parts: Components, loras: Sequence[tuple[Path, float]]) -> None:
    """Add the LoRAs to the weights while these are in fp32, where small changes are not rounded away."""
    from ldm.adapter_layers import bake  # here, as peft takes seconds to import
    from ldm.adapters import load_lora

    text_model = parts.text_encoder.model if parts.text_encoder is not None else None
    for number, (file, weight) in enumerate(loras):
        load_lora(parts.unet, text_model, file, weight, name=f"lora{number}")
    bake(parts.unet, text_model)

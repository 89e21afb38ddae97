"""A LoRA into the naming that another program reads: diffusers' or kohya's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
import yaml
from safetensors import SafetensorError, safe_open

from ldm.adapter_layers import plain_layers
from ldm.errors import UserError, user_input
from ldm.interchange.export import check_new, precision_of
from ldm.interchange.keys_text import TextLayout
from ldm.interchange.opening import read_model
from ldm.interchange.recognised import architecture_id, family_of, sizes_of
from ldm.lora_files import INFO_KEYS, LoraKind, save_lora
from ldm.lora_reading import lora_file, read_lora
from ldm.pipeline_folder import Components
from ldm.sampling import noise_config_of
from ldm.unet import spatial_channels_of


def export_lora(
    source: str | Path,
    out: str | Path,
    kind: LoraKind,
    dtype: str | torch.dtype = "fp32",
    *,
    base: str | Path | None = None,
    title: str | None = None,
    license: str | None = None,
    overwrite: bool = False,
    allow_pickle: bool = False,
) -> list[str]:
    """Write the LoRA at `source`, a file or its run, to the file `out`, and return what to warn the user of.

    The names of its layers are told by `base`, the model that it changes: by default the one that its run names, or
    its header. Raises UserError; then nothing at `out` has changed.
    """
    precision = precision_of(dtype)
    check_new(out, overwrite)
    model = read_model(base or base_of(Path(source)), allow_pickle=allow_pickle)
    text_layers = plain_layers(model.text_encoder.model) if model.text_encoder is not None else {}
    lora = read_lora(source, plain_layers(model.unet), text_layers)
    sizes = _sizes(model)
    inpainting = spatial_channels_of(model.unet) > 0
    architecture = architecture_id(sizes, noise_config_of(model.noise_scheduler), inpainting=inpainting)
    told = replace(
        lora.info,
        title=title or lora.info.title,
        license=license or lora.info.license,
        architecture=f"{architecture}/lora",
        base_model=_public(lora.info.base_model),
    )
    save_lora(out, replace(lora, info=told), kind=kind, dtype=precision)
    if kind == "kohya" and family_of(sizes) is None:
        return [
            "ComfyUI and A1111 know Stable Diffusion 1 and 2 in their own sizes, found a LoRA for a model of others: "
            "this toolkit and diffusers read the file, they have no such model to use it with"
        ]
    return []


def base_of(source: Path) -> str:
    """The model that a LoRA changes, by the config.yaml of its run, else by its header. Raises UserError."""
    config = (source if source.is_dir() else source.parent) / "config.yaml"
    if config.is_file():
        with user_input(str(config), ValueError, OSError, yaml.YAMLError):
            values = yaml.safe_load(config.read_text(encoding="utf-8"))
        if isinstance(values, dict) and values.get("model") is not None:
            return str(values["model"])
        if source.is_dir():
            raise UserError(f"{source}: found no LoRA, its run trained a whole model; give the run of a LoRA")
    file = lora_file(source)
    with user_input(f"{file}: found no safetensors file", OSError, SafetensorError), safe_open(file, "pt") as opened:
        told = (opened.metadata() or {}).get(INFO_KEYS["base_model"], "")
    if not told or not Path(told).exists():
        raise UserError(
            f"{source}: found no config.yaml that names the model it changes"
            f"{f', and its header names {told}, which is not here' if told else ''}; give it with --base MODEL"
        )
    return told


def _sizes(model: Components) -> dict[str, object]:
    text = model.text_encoder
    if text is None:
        return {}
    layout: TextLayout = "openclip" if text.tokenizer.pad_token == "!" else "transformers"
    return sizes_of(model.unet, model.vae, text.model, layout, text.length)


def _public(name: str) -> str:
    """Absolute paths tell strangers about the machine, and nothing about the model."""
    return Path(name).name if Path(name).is_absolute() else name

"""A Stable Diffusion checkpoint in one file, in the original layout: the inverse of `single_file`."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from conditioning.clip_tokenizer import END_OF_TEXT, clip_vocabulary_tokenizer
from conditioning.text import TextEncoder
from ldm.errors import UserError, user_input
from ldm.interchange.hints import HEADER_KEY, Hints
from ldm.interchange.keys import Shape, to_stored
from ldm.interchange.keys_text import BLOCKS, OPENCLIP_PREFIX, TRANSFORMERS_PREFIXES, TextLayout
from ldm.interchange.parts import Part, empty_text_model, empty_unet, empty_vae, text_part, unet_part, vae_part
from ldm.interchange.recognised import architecture_id, per_level, sizes_of, warnings_for
from ldm.interchange.safetensors_out import HASH_KEY, check_path, write_safetensors
from ldm.interchange.single_file import guess_from
from ldm.noise import NoiseConfig
from ldm.pipeline_folder import Components
from ldm.sampling import SCHEDULERS, noise_config_of, scheduler_name
from ldm.unet import spatial_channels_of

_POSITION_IDS = TRANSFORMERS_PREFIXES[0] + "embeddings.position_ids"
# What changes no output, or is carried by hints; keys with an underscore are diffusers' own notes.
_FREE = {"sample_size", "scaling_factor", "dropout", "upcast_attention", "force_upcast"}
_TEXT_FIELDS = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "hidden_act"),
    *("layer_norm_eps", "max_position_embeddings", "vocab_size"),
)


def write_single_file(
    components: Components,
    path: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    metadata: Mapping[str, str] | None = None,
) -> list[str]:
    """Write the model to `path` (.safetensors) in Stable Diffusion's original layout, whole or not at all.

    The text tower takes the layout whose padding it has: Stable Diffusion 2's (open_clip) with `!`, else 1's. The
    header follows ModelSpec 1.0.0 and tells `read_single_file` what shapes do not. `metadata` adds to it: names without
    a dot are ModelSpec's, such as title, author, description, license.

    Returns one line for each thing that ComfyUI and A1111 would not recognise or would take for another. Raises
    UserError for a model that the layout cannot hold, weights that `dtype` cannot, and a file that cannot be written.
    """
    check_path(path)  # before the work
    text_encoder = _text_encoder(components)
    unet_network = getattr(components.unet, "_orig_mod", components.unet)
    layout = _layout(text_encoder)
    with user_input("single file", ValueError):
        unet, vae = unet_part(unet_network), vae_part(components.vae)
        text = text_part(text_encoder.model, layout)
        noise = noise_config_of(components.noise_scheduler)
        hints = _hints(components, text_encoder, layout, noise)
        _check_readable((unet, vae, text), layout, hints)
    tensors = _tensors((unet, vae, text), layout, dtype)
    sizes = sizes_of(unet_network, components.vae, text_encoder.model, layout, text_encoder.length)
    header = _header(components, sizes, noise, Path(path).stem, metadata or {}) | {HEADER_KEY: hints.to_header()}
    write_safetensors(tensors, header, path)
    return warnings_for(sizes, noise, components.vae.config.scaling_factor, _comfy_guesses_v(unet, tensors))


def _text_encoder(components: Components) -> TextEncoder:
    """The text encoder; raises UserError unless the model is text-to-image or inpainting with a KL autoencoder."""
    conditions = {"a semantic map": components.semantic_encoder, "labels": components.label_encoder}
    given = [name for name, encoder in conditions.items() if encoder is not None]
    if given:
        raise UserError(f"single file: found a model that takes {given[0]}; allowed is text and masks; use a folder")
    if not isinstance(components.vae, AutoencoderKL):
        found = type(components.vae).__name__
        raise UserError(f"single file: found a {found}; allowed is AutoencoderKL in this layout; use a folder")
    if components.text_encoder is None:
        raise UserError("single file: found a model without text; allowed is one with it in this layout; use a folder")
    return components.text_encoder


def _layout(encoder: TextEncoder) -> TextLayout:
    """Which layout gives back the tokenizer; raises UserError when none does."""
    pad = encoder.tokenizer.pad_token
    layouts: dict[str, TextLayout] = {"!": "openclip", END_OF_TEXT: "transformers"}
    if pad not in layouts:
        raise UserError(f"single file: found a tokenizer that pads with {pad!r}; allowed is ! or {END_OF_TEXT}")
    if encoder.tokenizer.get_vocab() != clip_vocabulary_tokenizer().get_vocab():
        raise UserError(
            f"single file: found a tokenizer of {len(encoder.tokenizer)} tokens; allowed is CLIP's own, since the file "
            "holds none; use a folder"
        )
    return layouts[pad]


def _hints(components: Components, encoder: TextEncoder, layout: TextLayout, noise: NoiseConfig) -> Hints:
    unet, name = components.unet.config, scheduler_name(components.noise_scheduler)
    size = unet.sample_size
    return Hints(
        noise=noise,
        scheduler=name if name in SCHEDULERS else None,
        heads=per_level(unet.num_attention_heads or unet.attention_head_dim, len(unet.block_out_channels)),
        norm_groups=unet.norm_num_groups,
        vae_norm_groups=components.vae.config.norm_num_groups,
        text_heads=encoder.model.config.num_attention_heads,
        text_activation=encoder.model.config.hidden_act,
        text_blocks=encoder.model.config.num_hidden_layers if layout == "openclip" else None,
        text_length=encoder.length,
        scaling_factor=components.vae.config.scaling_factor,
        sample_size=tuple(size) if isinstance(size, list | tuple) else size,
    )


def _check_readable(parts: tuple[Part, Part, Part], layout: TextLayout, hints: Hints) -> None:
    """Raise ValueError, naming it, for what a reader of the file would not find out about the networks."""
    stored: dict[str, Shape] = {key: shape for part in parts for key, shape in part.stored.items()}
    prefix = OPENCLIP_PREFIX if layout == "openclip" else TRANSFORMERS_PREFIXES[0]
    unet, vae, text = parts
    for name, network, read in (("unet", unet, empty_unet(stored, hints)), ("vae", vae, empty_vae(stored, hints))):
        ours, theirs, levels = dict(network.network.config), dict(read.config), len(read.config.block_out_channels)
        for key in sorted(ours.keys() - _FREE):
            same = per_level(ours[key], levels) == per_level(theirs.get(key), levels)
            if not (same or key.startswith("_")):
                raise ValueError(f"{name}: found {key} {ours[key]}; allowed is {theirs.get(key)}; use a folder")
    ours, theirs = text.network.config, empty_text_model(stored, hints, layout, prefix).config
    for key in _TEXT_FIELDS:
        if getattr(ours, key) != getattr(theirs, key):
            raise ValueError(f"text_encoder: found {key} {getattr(ours, key)}; allowed is {getattr(theirs, key)}")


def _tensors(parts: tuple[Part, Part, Part], layout: TextLayout, dtype: torch.dtype) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for part in parts:
        tensors |= to_stored(part.places, part.network.state_dict(), dtype)
    for key, tensor in tensors.items():
        if dtype == torch.float16 and not tensor.isfinite().all():
            raise UserError(f"single file: found {key} beyond float16's range; allowed is bf16 or fp32; choose one")
    config = parts[2].network.config
    return tensors | (_openclip_rest(tensors, config, dtype) if layout == "openclip" else _clip_rest(config))


def _clip_rest(config: Any) -> dict[str, Tensor]:
    """The table of positions that older versions of transformers kept among the weights."""
    return {_POSITION_IDS: torch.arange(config.max_position_embeddings)[None]}


def _openclip_rest(tensors: Mapping[str, Tensor], config: Any, dtype: torch.dtype) -> dict[str, Tensor]:
    """What Stable Diffusion 2 holds of open_clip and nothing reads: the last block, the projection, the logit scale.

    The readers expect them, so the last block is the one before again, and the projection none at all.
    """
    last = f"{OPENCLIP_PREFIX}{BLOCKS}{config.num_hidden_layers - 1}."
    following = f"{OPENCLIP_PREFIX}{BLOCKS}{config.num_hidden_layers}."
    rest = {key.replace(last, following): tensor.clone() for key, tensor in tensors.items() if key.startswith(last)}
    rest[f"{OPENCLIP_PREFIX}text_projection"] = torch.eye(config.hidden_size, dtype=dtype)
    rest[f"{OPENCLIP_PREFIX}logit_scale"] = torch.tensor(1.0, dtype=dtype)
    return rest


def _header(
    components: Components, sizes: dict[str, Any], noise: NoiseConfig, title: str, metadata: Mapping[str, str]
) -> dict[str, str]:
    size = components.unet.config.sample_size
    height, width = (side * 2 ** (len(components.vae.config.block_out_channels) - 1) for side in per_level(size, 2))
    header = {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": architecture_id(sizes, noise, inpainting=spatial_channels_of(components.unet) > 0),
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.title": title,
        "modelspec.date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "modelspec.resolution": f"{width}x{height}",
    }
    if noise.prediction in ("epsilon", "v_prediction"):
        header["modelspec.prediction_type"] = noise.prediction.removesuffix("_prediction")
    added = {key if "." in key else f"modelspec.{key}": str(value) for key, value in metadata.items()}
    if HASH_KEY in added:
        raise UserError(f"metadata: found {HASH_KEY}, which is computed; allowed are other keys; leave it out")
    return header | added


def _comfy_guesses_v(unet: Part, tensors: Mapping[str, Tensor]) -> bool:
    return guess_from(unet, tensors.get) == "v_prediction"

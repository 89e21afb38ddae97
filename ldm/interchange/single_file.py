"""Stable Diffusion in one file, in the original layout: read with no config beside it and no network."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from diffusers import AutoencoderKL
from torch import Tensor

from conditioning.clip_tokenizer import VOCABULARY_SIZE, clip_vocabulary_tokenizer
from conditioning.text import TextEncoder
from ldm.errors import user_input
from ldm.interchange import keys_unet, keys_vae
from ldm.interchange.hints import NO_HINTS, Hints, hints_of_header
from ldm.interchange.keys import fits, to_ours
from ldm.interchange.keys_text import BLOCKS, OPENCLIP_PREFIX, TextLayout
from ldm.interchange.parts import (
    Part,
    empty_text_model,
    empty_unet,
    empty_vae,
    text_layout_of,
    text_part,
    unet_part,
    vae_part,
)
from ldm.interchange.weight_file import WeightFile, open_weights
from ldm.noise import NoiseConfig, PredictionType
from ldm.pipeline_folder import Components
from ldm.sampling import make_scheduler

logger = logging.getLogger(__name__)
STANDARD_NOISE = NoiseConfig(schedule="scaled_linear", prediction="epsilon", beta_start=0.00085, beta_end=0.012)
_NOT_READ = re.compile(
    r"model_ema\..*|global_step|(alphas_|betas|sqrt_|log_one_minus_|posterior_|logvar|lvlb_weights|scale_factor).*|"
    r"first_stage_model\.loss\..*|cond_stage_model\.model\.(logit_scale|text_projection|attn_mask)|"
    r"cond_stage_model\.transformer\..*position_ids"
)
"""What published checkpoints hold beside the networks: running averages, noise tables, a loss, text projections."""
_ALONE = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.", "quantize.", "loss.")
_BLOCK = re.compile(re.escape(OPENCLIP_PREFIX + BLOCKS) + r"(\d{1,4})\..*")
_V_MARK = "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias"
_V_DEVIATION = 0.09


def read_single_file(path: str | Path, *, allow_pickle: bool = False, hints: Hints = NO_HINTS) -> Components:
    """Read a Stable Diffusion 1 or 2 checkpoint of any size, inpainting too, into float32 networks.

    The architecture comes from keys and shapes; what these do not tell comes from `hints`, else from the file's header,
    else from a rule (see `Hints`). fp16, bf16 and fp32 are read; running averages in the file are not. A pickled
    `.ckpt` is opened only with `allow_pickle`. Nothing is downloaded: the tokenizer is CLIP's own.

    Raises UserError, and loads nothing, for a file that is damaged or something else, and for missing or wrong tensors.
    Tensors that are left over are named in a warning, or refused where they belong to the U-Net or autoencoder.
    """
    with open_weights(path, allow_pickle=allow_pickle) as file, user_input(str(path), ValueError):
        hints = hints.over(hints_of_header(file.metadata))
        _check_kind(file)
        layout, prefix = text_layout_of(file.shapes)
        unet = unet_part(empty_unet(file.shapes, hints))
        vae = vae_part(empty_vae(file.shapes, hints, _scale_factor(file)))
        text = text_part(empty_text_model(file.shapes, hints, layout, prefix), layout, prefix)
        parts = (unet, vae, text)
        blocks = text.network.config.num_hidden_layers
        _check_tensors(file, parts, lambda key: _is_known(key, blocks))
        _check_fit(unet, vae, text)
        noise = _noise_config(file, unet, hints)
        length = hints.text_length or text.network.config.max_position_embeddings
        if not 3 <= length <= text.network.config.max_position_embeddings:
            raise ValueError(f"found {length} tokens of text; allowed is 3 up to the tower's positions")
        unet.network.register_to_config(sample_size=_sample_size(file, vae, noise, layout, hints))
        scheduler = make_scheduler(hints.scheduler or "dpm++", noise)
        networks = [part.load(to_ours(part.places, file.read, part.shapes)) for part in parts]
    return Components(networks[1], networks[0], scheduler, _text_encoder(networks[2], layout, length))


def read_autoencoder_file(path: str | Path, *, allow_pickle: bool = False, hints: Hints = NO_HINTS) -> AutoencoderKL:
    """Read a file of an autoencoder alone, or that of a whole checkpoint, in the original layout, into float32.

    As `read_single_file`, which see; its keys may lie below `first_stage_model.` or on their own.
    """
    with open_weights(path, allow_pickle=allow_pickle) as file, user_input(str(path), ValueError):
        hints = hints.over(hints_of_header(file.metadata))
        if not any(key.startswith(keys_vae.PREFIX) for key in file.shapes):
            file = _below(file, keys_vae.PREFIX)
        vae = vae_part(empty_vae(file.shapes, hints, _scale_factor(file)))
        _check_tensors(file, (vae,), lambda key: not key.startswith(keys_vae.PREFIX) or _is_known(key, 0))
        return vae.load(to_ours(vae.places, file.read, vae.shapes))


def _below(file: WeightFile, prefix: str) -> WeightFile:
    """The same file with `prefix` before the keys of its networks; a part that is alone goes without."""
    names = {f"{prefix}{key}" if key.startswith(_ALONE) else key: key for key in file.shapes}
    return replace(
        file,
        shapes={name: file.shapes[key] for name, key in names.items()},
        numbers=frozenset(name for name, key in names.items() if key in file.numbers),
        read=lambda name: file.read(names[name]),
    )


def _check_kind(file: WeightFile) -> None:
    """Raise ValueError, with what it seems to be, for a file that is no Stable Diffusion 1 or 2 checkpoint."""
    if any(key.startswith("conditioner.embedders.") for key in file.shapes):
        raise ValueError("found Stable Diffusion XL's text encoders; allowed is Stable Diffusion 1 or 2")
    wanted = {"U-Net": keys_unet.PREFIX, "autoencoder": keys_vae.PREFIX, "text encoder": "cond_stage_model."}
    lost = {name: prefix for name, prefix in wanted.items() if not any(key.startswith(prefix) for key in file.shapes)}
    if lost:
        names = " and ".join(f"{name} ({prefix}*)" for name, prefix in lost.items())
        raise ValueError(
            f"found no {names} among its {_some(sorted(file.shapes), 'tensors')}; "
            "allowed is a whole Stable Diffusion 1 or 2 checkpoint in the original layout"
        )


def _check_tensors(file: WeightFile, parts: Sequence[Part], known: Callable[[str], bool]) -> None:
    """Raise ValueError unless every tensor of the networks is there, in its shape, and no other of theirs.

    `known` tells of a key that is left over whether it is known not to matter.
    """
    stored = {key: shape for part in parts for key, shape in part.stored.items()}
    if lost := [key for key in stored if key not in file.shapes]:
        raise ValueError(f"missing are {_some(lost, 'tensors')}; allowed is a whole checkpoint; download it again")
    for key, shape in stored.items():
        if not fits(file.shapes[key], shape) or key not in file.numbers:
            kind = "" if key in file.numbers else " of whole numbers"
            raise ValueError(f"found {key} {list(file.shapes[key])}{kind}; allowed beside the others is {list(shape)}")
    left = [key for key in file.shapes if key not in stored and not known(key)]
    if strange := [key for key in left if key.startswith((keys_unet.PREFIX, keys_vae.PREFIX))]:
        raise ValueError(f"unexpected are {_some(strange, 'tensors')}; allowed is a plain text-to-image model")
    if left:
        logger.warning("%s: not read are %s", file.path, _some(left, "unexpected tensors"))


def _is_known(key: str, blocks: int) -> bool:
    """Whether it is known not to matter, as the blocks of an open_clip tower behind the first `blocks`."""
    block = _BLOCK.fullmatch(key)
    return int(block[1]) >= blocks if block else bool(_NOT_READ.fullmatch(key))


def _some(keys: Sequence[str], what: str) -> str:
    return f"{len(keys)} {what} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"


def _check_fit(unet: Part, vae: Part, text: Part) -> None:
    unet_config, latents = unet.network.config, vae.network.config.latent_channels
    # Its own latents, or a mask and masked latents too.
    if unet_config.out_channels != latents or unet_config.in_channels not in (latents, 2 * latents + 1):
        raise ValueError(
            f"found a U-Net of {unet_config.in_channels} input and {unet_config.out_channels} output channels; allowed "
            f"with this autoencoder is {latents} or, for inpainting, {2 * latents + 1} and {latents}"
        )
    width = text.network.config.hidden_size
    if unet_config.cross_attention_dim != width:
        raise ValueError(
            f"found a U-Net that reads text of width {unet_config.cross_attention_dim}, and a text encoder of {width}; "
            "allowed is one width"
        )
    if text.network.config.vocab_size != VOCABULARY_SIZE:
        raise ValueError(
            f"found a vocabulary of {text.network.config.vocab_size} tokens; allowed is CLIP's {VOCABULARY_SIZE}, "
            "since the file holds no tokenizer; use a folder"
        )


def _scale_factor(file: WeightFile) -> float | None:
    """latent-diffusion keeps the factor that it measured as a tensor of the model."""
    if "scale_factor" not in file.numbers or file.shapes["scale_factor"] not in ((), (1,)):
        return None
    factor = float(file.read("scale_factor"))
    if not 0 < factor < float("inf"):
        raise ValueError(f"found scale_factor {factor}; allowed is a number above 0; give scaling_factor as a hint")
    return factor


def _noise_config(file: WeightFile, unet: Part, hints: Hints) -> NoiseConfig:
    noise = hints.noise or STANDARD_NOISE
    if hints.prediction is not None:
        return replace(noise, prediction=hints.prediction)
    return noise if hints.noise is not None else replace(noise, prediction=_guessed_prediction(file, unet))


def _guessed_prediction(file: WeightFile, unet: Part) -> PredictionType:
    guess = guess_from(unet, lambda key: file.read(key) if key in file.numbers else None)
    if guess is None:
        return "epsilon"
    logger.warning("%s: prediction %s by a guess from its weights; give the prediction if it is not", file.path, guess)
    return guess


def guess_from(unet: Part, read: Callable[[str], Tensor | None]) -> PredictionType | None:
    """ComfyUI's rule (comfy/supported_models.py, SD20): the two Stable Diffusion 2 differ in how one bias spreads.

    None where it says nothing: another width of text, or inpainting. `read` gives the tensor of a key if there is one.
    """
    config = unet.network.config
    mark = read(_V_MARK) if config.cross_attention_dim == 1024 and config.in_channels == 4 else None
    if mark is None:
        return None
    return "v_prediction" if mark.float().std(correction=0) > _V_DEVIATION else "epsilon"


def _sample_size(file: WeightFile, vae: Part, noise: NoiseConfig, layout: TextLayout, hints: Hints) -> Any:
    if hints.sample_size is not None:
        return hints.sample_size
    factor = 2 ** (len(vae.network.config.block_out_channels) - 1)
    found = re.fullmatch(r"(\d{1,5})x(\d{1,5})", file.metadata.get("modelspec.resolution", ""))
    if found and int(found[1]) >= factor and int(found[2]) >= factor:
        width, height = int(found[1]) // factor, int(found[2]) // factor
        return width if width == height else (height, width)
    return (768 if layout == "openclip" and noise.prediction == "v_prediction" else 512) // factor


def _text_encoder(model: Any, layout: TextLayout, length: int) -> TextEncoder:
    pad = {"pad_token": "!"} if layout == "openclip" else {}
    return TextEncoder(clip_vocabulary_tokenizer(length, **pad), model)

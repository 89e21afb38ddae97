"""The autoencoder: diffusers' `AutoencoderKL` or `VQModel`, fresh or loaded."""

from __future__ import annotations

import hashlib
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from diffusers import AutoencoderKL, VQModel
from safetensors import SafetensorError
from torch import nn

Autoencoder: TypeAlias = AutoencoderKL | VQModel

_CLASSES: dict[str, Any] = {"AutoencoderKL": AutoencoderKL, "VQModel": VQModel}
_KINDS = {"kl": "AutoencoderKL", "vq": "VQModel"}
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_HE_OVER_TORCH = math.sqrt(2 * 3)
"""Standard deviation of He's first weights, the root of 2 / fan-in, over torch's, the root of 1 / (3 fan-in)."""
_BRANCH_END = 0.1
"""By how much the last convolution of a residual branch starts smaller still."""


@dataclass(frozen=True, kw_only=True)
class AutoencoderConfig:
    """Architecture of a fresh autoencoder, or where to load one to continue from."""

    kind: Literal["kl", "vq"] = "kl"
    pretrained: str | None = None
    """Folder or hub id of an autoencoder to continue from; the architecture fields below are then not used."""
    latent_channels: int = 4
    channels: tuple[int, ...] = (128, 256, 512, 512)
    """Width of each level; an image side shrinks by 2 ** (levels - 1)."""
    layers_per_block: int = 2
    mid_attention: bool = True
    norm_groups: int = 32
    codebook_size: int = 8192
    """`vq` only."""
    initial_logvar: float = -6.0
    """`kl` only: log-variance of the posterior at the start. At 0 its unit noise drowns the signal for long."""
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        if self.kind not in _KINDS:
            raise ValueError(f"kind: found {self.kind!r}; allowed is kl or vq; choose one")
        for name, smallest in (
            ("latent_channels", 1),
            ("layers_per_block", 1),
            ("norm_groups", 1),
            ("codebook_size", 2),
        ):
            if getattr(self, name) < smallest:
                raise ValueError(f"{name}: found {getattr(self, name)}; allowed is {smallest} or more; raise it")
        if not self.channels:
            raise ValueError("channels: found none; allowed is one width per level; give at least one")
        for width in self.channels:
            if width < 1 or width % self.norm_groups:
                raise ValueError(
                    f"channels: found {width}; allowed is a positive multiple of norm_groups ({self.norm_groups}); "
                    "change one of the two"
                )
        if not -30.0 <= self.initial_logvar <= 20.0:
            raise ValueError(f"initial_logvar: found {self.initial_logvar}; allowed is -30 to 20; -6 is usual")
        if self.gradient_checkpointing and self.kind == "vq":
            raise ValueError(
                "gradient_checkpointing: found true with kind vq; allowed is false, since diffusers' VQModel "
                "has none; set it to false or use kind kl"
            )


def build_autoencoder(config: AutoencoderConfig) -> Autoencoder:
    """A fresh autoencoder (weights from torch's global generator: seed it first), or `config.pretrained` loaded.

    Raises:
        ValueError, FileNotFoundError: `pretrained` cannot be loaded, or is of the other kind.
    """
    autoencoder = _fresh(config) if config.pretrained is None else _continued(config)
    if config.gradient_checkpointing:
        autoencoder.enable_gradient_checkpointing()
    return autoencoder


def _continued(config: AutoencoderConfig) -> Autoencoder:
    if config.pretrained is None:
        raise TypeError("only for a config that names a pretrained autoencoder")
    autoencoder = load_autoencoder(config.pretrained)
    found = type(autoencoder).__name__
    if found != _KINDS[config.kind]:
        raise ValueError(
            f"pretrained: found {found} in {config.pretrained}; allowed is {_KINDS[config.kind]} with kind "
            f"{config.kind}; change kind or the path"
        )
    return autoencoder


def _fresh(config: AutoencoderConfig) -> Autoencoder:
    levels = len(config.channels)
    shared: dict[str, Any] = {
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "block_out_channels": config.channels,
        "layers_per_block": config.layers_per_block,
        "latent_channels": config.latent_channels,
        "norm_num_groups": config.norm_groups,
        "mid_block_add_attention": config.mid_attention,
        "sample_size": 512,  # used by diffusers only as the tile size, should somebody switch tiling on
        "scaling_factor": 1.0,  # DESIGN 4: the scale is measured after training and folded into the weights
    }
    if config.kind == "vq":
        return _with_he_weights(VQModel(num_vq_embeddings=config.codebook_size, **shared))
    autoencoder = _with_he_weights(AutoencoderKL(**shared))
    with torch.no_grad():
        autoencoder.quant_conv.bias[config.latent_channels :].fill_(config.initial_logvar)
    return autoencoder


def _with_he_weights(autoencoder: Autoencoder) -> Autoencoder:
    """Give convolutions the variance 2 / fan-in (He et al., arXiv 1502.01852), a hundredth of it where a branch ends.

    torch's default is 1 / (3 fan-in). Each of the dozen convolutions on the way from image to image then loses two
    thirds of the signal's variance, and what is left of a plain colour is lost in the residual branches: narrow
    autoencoders take several times as long to learn colours at all (docs/reference.md has the figures).
    """
    with torch.no_grad():
        for name, module in autoencoder.named_modules():
            if isinstance(module, nn.Conv2d):
                module.weight.mul_(_HE_OVER_TORCH * (_BRANCH_END if name.endswith(".conv2") else 1.0))
    return autoencoder


def load_autoencoder(path: str | Path, *, subfolder: str | None = None, variant: str | None = None) -> Autoencoder:
    """Load an `AutoencoderKL` or `VQModel` in float32 from safetensors; its own config.json says which.

    Args:
        path: a folder (then the network is never touched), or a hub id `owner/name`; a third part, `owner/name/vae`,
            is the subfolder.
        subfolder: where below `path` the autoencoder lies, e.g. `vae` of a Stable Diffusion folder.
        variant: `fp16` for a file called `*.fp16.safetensors`.

    Raises:
        FileNotFoundError, ValueError: one line with what was found and how to mend it.
    """
    source, subfolder, local = _located(str(path), subfolder)
    name = f"{source}/{subfolder}" if subfolder else source
    if local:
        _check_folder(Path(name))
    place: dict[str, Any] = {"subfolder": subfolder, "local_files_only": local}
    kind = {} if variant is None else {"variant": variant}
    try:
        class_name = AutoencoderKL.load_config(source, **place).get("_class_name")
    except (OSError, ValueError) as error:
        found = "its config.json cannot be read" if local else "no such folder, and the hub gives no config.json"
        raise ValueError(f"{name}: {found} ({_one_line(error)})") from error
    if class_name not in _CLASSES:
        raise ValueError(f"{name}: found {class_name!r} in config.json; allowed is {' or '.join(_CLASSES)}")
    try:
        autoencoder, report = _CLASSES[class_name].from_pretrained(
            source, use_safetensors=True, torch_dtype=torch.float32, output_loading_info=True, **place, **kind
        )
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
        raise ValueError(f"{name}: its weights do not load as {class_name} ({_one_line(error)})") from error
    if report["missing_keys"]:  # diffusers would leave them at random values and only warn
        raise ValueError(
            f"{name}: {len(report['missing_keys'])} weights are missing from the file, {report['missing_keys'][0]} "
            "among them; save the autoencoder again or fetch the whole file"
        )
    return autoencoder


def _located(path: str, subfolder: str | None) -> tuple[str, str | None, bool]:
    """(folder or hub id, subfolder, whether it is local)."""
    if Path(path).exists():
        return path, subfolder, True
    owner_and_name, _, rest = path, "", ""
    if path.count("/") > 1:
        owner, name, rest = path.split("/", 2)
        owner_and_name = f"{owner}/{name}"
    if not _HUB_ID.fullmatch(owner_and_name) or owner_and_name.startswith("."):
        raise FileNotFoundError(f"{path}: no such folder, and not a hub id (owner/name); check the path")
    return owner_and_name, subfolder or rest or None, False


def _check_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: found no folder there; give the folder that holds config.json")
    if (folder / "config.json").is_file():
        return
    hint = "give the folder of an autoencoder saved by diffusers"
    if (folder / "vae" / "config.json").is_file():
        hint = f"this is a pipeline, so give {folder / 'vae'}"
    raise FileNotFoundError(f"{folder}: found no config.json; {hint}")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def downsampling_factor(autoencoder: Autoencoder) -> int:
    """How many image pixels a latent pixel spans along each side."""
    return 2 ** (len(autoencoder.config.block_out_channels) - 1)


def latent_channels(autoencoder: Autoencoder) -> int:
    """Channels of the latents that the U-Net sees."""
    config = autoencoder.config
    return config.get("vq_embed_dim") or config.latent_channels


def encoder_parameters(autoencoder: Autoencoder) -> list[nn.Parameter]:
    """All that decides the latent of an image: encoder, moments, codebook. Frozen in decoder-only fine-tuning."""
    modules = [autoencoder.encoder, autoencoder.quant_conv, getattr(autoencoder, "quantize", None)]
    return [parameter for module in modules if module is not None for parameter in module.parameters()]


def decoder_parameters(autoencoder: Autoencoder) -> list[nn.Parameter]:
    """All that turns a latent into an image; with `encoder_parameters`, every parameter exactly once."""
    modules = [autoencoder.post_quant_conv, autoencoder.decoder]
    return [parameter for module in modules if module is not None for parameter in module.parameters()]


def freeze_encoder(autoencoder: Autoencoder) -> None:
    """For decoder-only fine-tuning: latents stay what they were, so a U-Net trained on them still fits."""
    for parameter in encoder_parameters(autoencoder):
        parameter.requires_grad_(False)


def last_decoder_layer(autoencoder: Autoencoder) -> nn.Parameter:
    """The weight at which the adaptive weight compares gradients (VQGAN, arXiv 2012.09841, eq. 7)."""
    return autoencoder.decoder.conv_out.weight


def weights_hash(autoencoder: Autoencoder) -> str:
    """16 hex digits that change with any weight or config value, and do not change by saving and loading."""
    digest = hashlib.sha256()
    config = {key: value for key, value in autoencoder.config.items() if not key.startswith("_")}
    digest.update(f"{type(autoencoder).__name__}{json.dumps(config, sort_keys=True)}".encode())
    for name, tensor in sorted(autoencoder.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]

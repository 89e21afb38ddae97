"""The latent U-Net: diffusers' UNet2DConditionModel, built from a config and called in one place."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import get_args

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from conditioning.conditions import Conditions
from conditioning.folders import pretrained_location
from ldm.attention import AttentionBackend, set_attention
from ldm.errors import UserError, user_input

DEFAULT_HEADS = 8


@dataclass(frozen=True, kw_only=True)
class UNetConfig:
    """Size and kernels of the U-Net; the defaults are Stable Diffusion 1.5's.

    `channels`, `attention` have one entry a level, the finest first; each level but the last halves the latents.
    Attention is cross-attention where the model takes text. The middle follows the network: with text it always has
    attention, without text it is one residual block. Give the number of `heads`, or `head_width` channels a head
    (Stable Diffusion 2 has 64), or neither for 8 heads. With `pretrained` (a folder or a hub id, of a pipeline or of a
    U-Net) the architecture comes from there.

    `attention_backend`: `auto` is `sdpa`, torch's fused kernels. `math` is explicit matrix products; on a CPU use it
    for bf16 with tiny latents, where the fused backward is slow. In fp32 on two cores the two take the same time at
    8 x 8 latents and `sdpa` is four times faster at 16 x 16 (measured). Training: `math` is the text encoder's too.
    """

    channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int = 2
    attention: tuple[bool, ...] = (True, True, True, False)
    heads: int | None = None
    head_width: int | None = None
    norm_groups: int = 32
    gradient_checkpointing: bool = False
    attention_backend: AttentionBackend = "auto"
    pretrained: str | None = None

    def __post_init__(self) -> None:
        if not self.channels or min(self.channels) < 1:
            raise ValueError(f"channels: found {self.channels}; allowed is one positive number a level; e.g. 64, 128")
        if len(self.attention) != len(self.channels):
            raise ValueError(
                f"attention: found {len(self.attention)} entries for {len(self.channels)} levels of channels; "
                "allowed is one true or false a level; add or remove entries"
            )
        if self.layers_per_block < 1:
            raise ValueError(f"layers_per_block: found {self.layers_per_block}; allowed is 1 or more; 2 is usual")
        if self.attention_backend not in get_args(AttentionBackend):
            raise ValueError(
                f"attention_backend: found {self.attention_backend!r}; "
                f"allowed is {', '.join(get_args(AttentionBackend))}; choose one of these"
            )
        if self.heads is not None and self.head_width is not None:
            raise ValueError(f"heads: found {self.heads} beside head_width {self.head_width}; allowed is one; drop one")
        self._check_divisors()

    def _check_divisors(self) -> None:
        checks = [("norm_groups", self.norm_groups, self.channels)]
        # The last level counts even without attention of its own: the middle has its channels.
        used = [width for width, flag in zip(self.channels, self.attention, strict=True) if flag] + [self.channels[-1]]
        name, divisor = ("head_width", self.head_width) if self.head_width is not None else ("heads", self.heads)
        checks.append((name, DEFAULT_HEADS if divisor is None else divisor, tuple(used)))
        for field, number, widths in checks:
            wrong = [width for width in widths if number < 1 or width % number]
            if wrong:
                raise ValueError(
                    f"{field}: found {number}, which does not divide the {wrong[0]} channels of a level; "
                    "allowed is a divisor of every level's channels; change it or the channels"
                )

    def heads_of(self, width: int) -> int:
        """The number of attention heads of a level of `width` channels."""
        if self.head_width is not None:
            return max(1, width // self.head_width)
        return self.heads or DEFAULT_HEADS


def build_unet(
    config: UNetConfig,
    *,
    latent_channels: int,
    spatial_channels: int = 0,
    context_width: int | None,
    sample_size: int,
    class_embedding_width: int | None = None,
) -> UNet2DConditionModel:
    """A new U-Net (the caller seeds torch), or the pretrained one.

    Input is `latent_channels + spatial_channels`, output `latent_channels`, both [B, ?, sample_size, sample_size] in
    training. `context_width` is the text encoder's width, None for a network without text. `class_embedding_width` is
    that of `Conditions.class_embedding`. The saved config is plain diffusers'. Raises UserError when a pretrained
    network does not fit, or xformers is asked for and missing.
    """
    if config.pretrained is not None:
        unet = load_unet(config.pretrained, sample_size)
        check_fit(unet, latent_channels, spatial_channels, context_width, class_embedding_width)
        return prepare_unet(unet, config)
    with user_input("unet"):
        unet = UNet2DConditionModel(
            sample_size=sample_size,
            in_channels=latent_channels + spatial_channels,
            out_channels=latent_channels,
            **_architecture(config, context_width, class_embedding_width),
        )
    _start_cross_attention(unet)
    return prepare_unet(unet, config)


def _start_cross_attention(unet: UNet2DConditionModel) -> None:
    """Give the text's way in weights of variance 1 / fan-in (LeCun et al., Efficient BackProp, 1998), thrice torch's.

    At torch's, queries and keys make nearly equal attention to all tokens, padding included, of values that come
    through two layers at a ninth of their variance: too little for training to find soon that words matter.
    """
    for name, module in unet.named_modules():
        if name.endswith("attn2"):
            for layer in (module.to_q, module.to_k, module.to_v, module.to_out[0]):
                with torch.no_grad():
                    layer.weight.mul_(math.sqrt(3))


def prepare_unet(unet: UNet2DConditionModel, config: UNetConfig) -> UNet2DConditionModel:
    """Set what of `config` is no architecture: gradient checkpointing and the attention kernel; returns `unet`."""
    if config.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    set_attention(unet, config.attention_backend)
    return unet


def load_unet(name: str, sample_size: int) -> UNet2DConditionModel:
    """The U-Net of a folder or hub id, in training mode, to draw latents of `sample_size` unasked. Raises UserError."""
    with user_input("unet"):
        unet = _load(name)
    unet.register_to_config(sample_size=sample_size)  # the size that it draws unasked is the one trained last
    return unet.train()


def _load(name: str) -> UNet2DConditionModel:
    unet, report = UNet2DConditionModel.from_pretrained(
        **pretrained_location(name, "unet"), use_safetensors=True, output_loading_info=True
    )
    lost = [*report["missing_keys"], *report["unexpected_keys"]]
    if lost:
        raise ValueError(
            f"pretrained: found {name} whose weights are not those of its config, such as {lost[0]}; "
            "allowed is a whole U-Net; check the folder"
        )
    return unet


def _architecture(config: UNetConfig, context_width: int | None, class_width: int | None) -> dict[str, object]:
    with_text = context_width is not None
    kind = "CrossAttn" if with_text else "Attn"
    blocks = [kind if attention else "" for attention in config.attention]
    heads = [config.heads_of(width) for width in config.channels]
    architecture: dict[str, object] = {
        "block_out_channels": config.channels,
        "layers_per_block": config.layers_per_block,
        "norm_num_groups": config.norm_groups,
        "down_block_types": tuple(f"{block}DownBlock2D" for block in blocks),
        "up_block_types": tuple(f"{block}UpBlock2D" for block in reversed(blocks)),
        "mid_block_type": "UNetMidBlock2DCrossAttn" if with_text else "UNetMidBlock2D",
        # diffusers' attention_head_dim is the NUMBER of heads in cross-attention blocks, a head's width in the others.
        "attention_head_dim": tuple(
            heads if with_text else [w // h for w, h in zip(config.channels, heads, strict=True)]
        ),
    }
    if with_text:
        architecture["cross_attention_dim"] = context_width
    if class_width is not None:
        architecture["class_embed_type"] = "simple_projection"
        architecture["projection_class_embeddings_input_dim"] = class_width
    return architecture


def check_fit(
    unet: UNet2DConditionModel,
    latent_channels: int,
    spatial_channels: int,
    context: int | None,
    class_width: int | None,
) -> None:
    """Raise UserError unless the network takes these widths and no other condition."""
    wanted = (latent_channels, spatial_channels, context, class_width)
    found = (
        unet.config.out_channels,
        spatial_channels_of(unet),
        context_width_of(unet),
        class_embedding_width_of(unet),
    )
    names = ("latent channels", "spatial condition channels", "context width", "class embedding width")
    for name, want, have in zip(names, wanted, found, strict=True):
        if want != have:
            raise UserError(
                f"unet.pretrained: found a network with {name} {have}; the autoencoder and the conditions need {want}; "
                "use a network that fits, or change the conditions"
            )


def spatial_channels_of(unet: UNet2DConditionModel) -> int:
    """How many condition channels the network takes after the noisy latents."""
    return unet.config.in_channels - unet.config.out_channels


def context_width_of(unet: UNet2DConditionModel) -> int | None:
    """The width of the context that its cross-attention reads; None when it has no cross-attention."""
    blocks = (*unet.down_blocks, unet.mid_block)
    if not any(getattr(block, "has_cross_attention", False) for block in blocks):
        return None
    width = unet.config.cross_attention_dim
    return width if isinstance(width, int) else width[0]


def class_embedding_width_of(unet: UNet2DConditionModel) -> int | None:
    """The width of the class embedding that it adds to the time embedding; None when it takes none."""
    return unet.config.projection_class_embeddings_input_dim if unet.config.class_embed_type else None


def spatial_input(noisy_latents: Tensor, conditions: Conditions) -> Tensor:
    """The network's input, [B, C + S, h, w]: noisy latents, then mask, masked-image latents, semantic (DESIGN.md 3)."""
    if conditions.spatial is None:
        return noisy_latents
    return torch.cat([noisy_latents, conditions.spatial.to(noisy_latents.dtype)], dim=1)


def denoise(unet: UNet2DConditionModel, latents: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
    """The network's prediction, [B, C, h, w]: the single place where the U-Net is called.

    `latents` [B, C, h, w] are noisy; `timesteps` is [B] or a scalar, whole for diffusion, real for flow. Raises
    ValueError when the conditions are not those that the network was built for.
    """
    _check_conditions(unet, conditions)
    return unet(
        spatial_input(latents, conditions),
        timesteps,
        encoder_hidden_states=conditions.context,
        class_labels=conditions.class_embedding,
        return_dict=False,
    )[0]


def _check_conditions(unet: UNet2DConditionModel, conditions: Conditions) -> None:
    parts = (
        ("context", conditions.context, 2, context_width_of(unet)),
        ("spatial", conditions.spatial, 1, spatial_channels_of(unet) or None),
        ("class_embedding", conditions.class_embedding, 1, class_embedding_width_of(unet)),
    )
    for name, tensor, dimension, wanted in parts:
        found = None if tensor is None else tensor.shape[dimension]
        if found != wanted:
            raise ValueError(
                f"conditions.{name}: found {found} channels; this U-Net takes {wanted}; give what it takes"
            )

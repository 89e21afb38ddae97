"""The networks of stage 2: new ones, or those of a model that is trained further."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from diffusers import UNet2DConditionModel
from safetensors import SafetensorError

from autoencoder.model import Autoencoder, downsampling_factor, latent_channels, load_autoencoder
from conditioning.class_file import read_classes
from conditioning.encoders import ConditionEncoders
from conditioning.label import LabelConfig, LabelEncoder
from conditioning.semantic import SemanticConfig, SemanticEncoder
from conditioning.text import TextEncoder, build_text_encoder
from ldm.adapters import LoraConfig, add_lora
from ldm.data.sample import Source
from ldm.errors import UserError, user_input
from ldm.growing import SpatialLayout, grow
from ldm.interchange.opening import read_model
from ldm.noise import NoiseConfig
from ldm.randomness import seed_weights
from ldm.sampling import noise_config_of
from ldm.training.conditions import ConditionsConfig
from ldm.training.stage2 import Stage2Config
from ldm.unet import (
    UNetConfig,
    build_unet,
    check_fit,
    class_embedding_width_of,
    load_unet,
    prepare_unet,
    spatial_channels_of,
)


@dataclass(frozen=True)
class Networks:
    """All that a stage 2 run consists of before it is trained."""

    autoencoder: Autoencoder
    encoders: ConditionEncoders
    unet: UNet2DConditionModel
    noise: NoiseConfig


def build_networks(config: Stage2Config, source: Source) -> Networks:
    """New networks seeded by `config.seed`, or those of `config.model` with the conditions that they lack.

    Raises `UserError` when something that the config names is missing or does not fit.
    """
    seed_weights(config.seed)
    if config.model is not None:
        return _of_model(config, config.model, source)
    with user_input("autoencoder"):
        autoencoder = load_autoencoder(str(config.autoencoder))
    encoders = build_encoders(config.conditions, source, config.unet.pretrained)
    unet = build_conditioned_unet(
        config.unet,
        config.conditions,
        encoders,
        latent_channels=latent_channels(autoencoder),
        sample_size=config.data.resolution // downsampling_factor(autoencoder),
    )
    return Networks(autoencoder, encoders, unet, config.noise or NoiseConfig())


def _of_model(config: Stage2Config, model: str, source: Source) -> Networks:
    """The networks of a pipeline or a single file, in fp32; autoencoder and noise as the config says where it does."""
    parts = read_model(model)
    autoencoder = parts.vae
    if config.autoencoder is not None:
        with user_input("autoencoder"):
            autoencoder = load_autoencoder(config.autoencoder)
    if config.conditions.text.encoder == "model" and parts.text_encoder is None:
        raise UserError(f"conditions.text.encoder: found model, but {config.model} has no text encoder; set it to none")
    encoders = build_encoders(config.conditions, source, model, parts.text_encoder)
    parts.unet.float().train()
    parts.unet.register_to_config(sample_size=config.data.resolution // downsampling_factor(autoencoder))
    unet_config = replace(config.unet, pretrained=model)
    unet = adapt_unet(parts.unet, unet_config, config.conditions, encoders, latent_channels(autoencoder))
    if config.lora is not None:
        _add_lora(unet, encoders, config.lora, grown=unet is not parts.unet)
    return Networks(autoencoder.float(), encoders.float(), unet, config.noise or noise_config_of(parts.noise_scheduler))


def _add_lora(unet: UNet2DConditionModel, encoders: ConditionEncoders, config: LoraConfig, *, grown: bool) -> None:
    """Freeze the model but for a new LoRA, and for the layers that took on new conditions: those are trained whole."""
    add_lora(unet, encoders.text.model if encoders.text is not None else None, config)
    if grown:
        unet.conv_in.requires_grad_(True)
        if unet.class_embedding is not None:
            unet.class_embedding.requires_grad_(True)


def build_encoders(
    config: ConditionsConfig, source: Source, pretrained: str | None = None, text: TextEncoder | None = None
) -> ConditionEncoders:
    """The encoders that `config` asks for; new ones take their weights from torch's global seed.

    With `pretrained`, the local folder of a pipeline whose U-Net is trained further, its own encoders of maps and
    labels are used. `text` is the base model's text encoder, for `text: {encoder: model}`. Raises `UserError` when
    classes are named nowhere or differ from those of the pretrained encoder.
    """
    if config.text.encoder not in ("none", "model"):
        with user_input("conditions.text"):
            text = build_text_encoder(config.text)
    elif config.text.encoder == "none":
        text = None
    elif text is not None:
        text = text.requires_grad_(False).eval()
    semantic = label = None
    with user_input("conditions", ValueError, OSError, SafetensorError):
        if config.semantic is not None:
            semantic = _semantic_encoder(config.semantic, source, pretrained)
        if config.label is not None:
            label = _label_encoder(config.label, source, pretrained)
    return ConditionEncoders(text, semantic, label)


def _semantic_encoder(config: SemanticConfig, source: Source, pretrained: str | None) -> SemanticEncoder:
    classes = read_classes(config.classes) if config.classes else source.semantic_classes
    if not classes:
        raise UserError(
            "conditions.semantic.classes: found null, and the data does not name the classes of its maps; "
            "allowed is a file with one class name a line; write one"
        )
    if pretrained is None or not (Path(pretrained) / "semantic_encoder").is_dir():
        return SemanticEncoder(classes, config.channels)
    encoder = SemanticEncoder.from_pretrained(pretrained)
    if encoder.classes != tuple(classes) or encoder.channels != config.channels:
        theirs = f"{len(encoder.classes)} ({', '.join(encoder.classes[:5])}, ...) and {encoder.channels}"
        found = f"{len(classes)} classes and {config.channels} channels"
        raise UserError(f"conditions.semantic: found {found}; {pretrained} was trained with {theirs}; use the same")
    return encoder


def _label_encoder(config: LabelConfig, source: Source, pretrained: str | None) -> LabelEncoder:
    count = len(source.classes) if config.classes is None else config.classes
    if count == 0 or count < len(source.classes):
        raise UserError(
            f"conditions.label.classes: found {count}; the data has {len(source.classes)} labels; "
            "allowed is as many or more; set the number, or add labels to the data"
        )
    classes = (*source.classes, *(str(number) for number in range(len(source.classes), count)))
    if pretrained is None or not (Path(pretrained) / "label_encoder").is_dir():
        return LabelEncoder(classes, config.width)
    encoder = LabelEncoder.from_pretrained(pretrained)
    if encoder.classes != classes or encoder.width != config.width:
        raise UserError(
            f"conditions.label: found {len(classes)} classes of width {config.width}; {pretrained} was trained with "
            f"{len(encoder.classes)} ({', '.join(encoder.classes[:5])}, ...) of width {encoder.width}; use the same"
        )
    return encoder


def build_conditioned_unet(
    config: UNetConfig,
    conditions: ConditionsConfig,
    encoders: ConditionEncoders,
    *,
    latent_channels: int,
    sample_size: int,
) -> UNet2DConditionModel:
    """The U-Net for these conditions: a new one, or a pretrained one that takes on those it lacks.

    What is added starts at zero, so at step 0 a grown network draws what it drew before. Raises UserError when the
    pretrained one takes something that the config does not give it.
    """
    if config.pretrained is None:
        return build_unet(
            config,
            latent_channels=latent_channels,
            spatial_channels=conditions.layout.channels(latent_channels),
            context_width=encoders.context_width,
            sample_size=sample_size,
            class_embedding_width=encoders.label_width,
        )
    return adapt_unet(load_unet(config.pretrained, sample_size), config, conditions, encoders, latent_channels)


def adapt_unet(
    unet: UNet2DConditionModel,
    config: UNetConfig,
    conditions: ConditionsConfig,
    encoders: ConditionEncoders,
    latent_channels: int,
) -> UNet2DConditionModel:
    """A loaded U-Net with the conditions that it lacks. Raises UserError when it takes one that is not given."""
    spatial_channels = conditions.layout.channels(latent_channels)
    old = _layout_of(unet, str(config.pretrained))
    if old != conditions.layout or class_embedding_width_of(unet) != encoders.label_width:
        unet = grow(unet, old=old, new=conditions.layout, class_embedding_width=encoders.label_width)
    check_fit(unet, latent_channels, spatial_channels, encoders.context_width, encoders.label_width)
    return prepare_unet(unet, config)


def _layout_of(unet: UNet2DConditionModel, pretrained: str) -> SpatialLayout:
    """The condition channels of a pretrained U-Net; how many are a map's tells the encoder beside it."""
    folder = Path(pretrained)
    semantic = 0
    if (folder / SemanticEncoder.FOLDER).is_dir():
        with user_input("unet.pretrained", ValueError, OSError, SafetensorError):
            semantic = SemanticEncoder.from_pretrained(folder).channels
    return SpatialLayout(inpainting=spatial_channels_of(unet) > semantic, semantic_channels=semantic)

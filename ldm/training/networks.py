"""The networks of stage 2: new ones, or those of a model that is trained further."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from diffusers import UNet2DConditionModel
from safetensors import SafetensorError

from autoencoder.model import Autoencoder, downsampling_factor, latent_channels, load_autoencoder
from conditioning.class_file import read_classes
from conditioning.embeddings import TextualInversionConfig, learn_word
from conditioning.encoders import ConditionEncoders
from conditioning.label import LabelConfig, LabelEncoder
from conditioning.semantic import SemanticConfig, SemanticEncoder
from conditioning.text import build_text_encoder
from ldm.adapters import LoraConfig, add_lora
from ldm.data.sample import Source
from ldm.errors import UserError, user_input
from ldm.growing import SpatialLayout, grow
from ldm.interchange.opening import read_model
from ldm.noise import NoiseConfig
from ldm.pipeline_folder import Components
from ldm.randomness import seed_weights
from ldm.sampling import noise_config_of
from ldm.training.checkpoint import checksum
from ldm.training.conditions import ConditionsConfig
from ldm.training.stage2_config import Stage2Config
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
    weights: str = ""
    """A hash of the weights of `model` if the config asks for class images, which are drawn with them."""


def build_networks(config: Stage2Config, source: Source) -> Networks:
    """New networks seeded by `config.seed`, or those of `config.model` with the conditions that they lack.

    Raises `UserError` when something that the config names is missing or does not fit.
    """
    seed_weights(config.seed)
    if config.model is not None:
        return networks_of(config, read_model(config.model), source)
    with user_input("autoencoder"):
        autoencoder = load_autoencoder(str(config.autoencoder))
    own = encoders_beside(config.unet.pretrained)
    encoders = build_encoders(config.conditions, source, own)
    prepare_text(config.unet, encoders)
    unet = build_conditioned_unet(
        config.unet,
        config.conditions,
        encoders,
        own,
        latent_channels=latent_channels(autoencoder),
        sample_size=config.data.resolution // downsampling_factor(autoencoder),
    )
    return Networks(autoencoder, encoders, unet, config.noise or NoiseConfig())


def networks_of(config: Stage2Config, parts: Components, source: Source) -> Networks:
    """The networks of a model's parts, in fp32; autoencoder and noise as the config says where it does."""
    autoencoder = parts.vae
    if config.autoencoder is not None:
        with user_input("autoencoder"):
            autoencoder = load_autoencoder(config.autoencoder)
    if config.conditions.text.encoder == "model" and parts.text_encoder is None:
        raise UserError(f"conditions.text.encoder: found model, but {config.model} has no text encoder; set it to none")
    own = ConditionEncoders(parts.text_encoder, parts.semantic_encoder, parts.label_encoder)
    weights = _hash_of(autoencoder, own, parts.unet) if config.prior is not None else ""
    encoders = build_encoders(config.conditions, source, own)
    prepare_text(config.unet, encoders)
    parts.unet.float().train()
    parts.unet.register_to_config(sample_size=config.data.resolution // downsampling_factor(autoencoder))
    unet = adapt_unet(parts.unet, config.unet, config.conditions, encoders, own, latent_channels(autoencoder))
    if config.lora is not None:
        _add_lora(unet, encoders, config.lora, own, grown=unet is not parts.unet)
    if config.textual_inversion is not None:
        _add_word(unet, encoders, config.textual_inversion, grown=unet is not parts.unet)
    noise = config.noise or noise_config_of(parts.noise_scheduler)
    return Networks(autoencoder.float(), encoders.float(), unet, noise, weights)


def prepare_text(config: UNetConfig, encoders: ConditionEncoders) -> None:
    """Let the text encoder do as `config` says of the U-Net: keep no activations, compute attention explicitly."""
    if encoders.text is None:
        return
    model = encoders.text.model
    if config.gradient_checkpointing:
        # Does nothing in evaluation mode, in which a frozen encoder always is.
        enable = getattr(model, "activation_checkpointing_enable", None)  # the newer name
        (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
    if config.attention_backend == "math":
        model.set_attn_implementation("eager")


def _hash_of(autoencoder: Autoencoder, encoders: ConditionEncoders, unet: UNet2DConditionModel) -> str:
    parts = {"autoencoder": autoencoder, "encoders": encoders, "unet": unet}
    return checksum({name: part.state_dict() for name, part in parts.items()})


def _add_word(
    unet: UNet2DConditionModel, encoders: ConditionEncoders, config: TextualInversionConfig, *, grown: bool
) -> None:
    """Freeze the model but for the vectors of a new word."""
    if grown:
        raise UserError(
            "textual_inversion: found beside new conditions, whose layers have to be trained; allowed are those that "
            "the model has; train them first"
        )
    unet.requires_grad_(False)
    encoders.requires_grad_(False)
    if encoders.text is None:
        raise TypeError("the config asks for text, and the model has it")
    with user_input("textual_inversion"):
        learn_word(encoders.text, config)


def _add_lora(
    unet: UNet2DConditionModel,
    encoders: ConditionEncoders,
    config: LoraConfig,
    own: ConditionEncoders,
    *,
    grown: bool,
) -> None:
    """Freeze the model but for a new LoRA, and for the layers that took on new conditions: those are trained whole.

    Encoders that came with the model are frozen too, those of new conditions are not.
    """
    add_lora(unet, encoders.text.model if encoders.text is not None else None, config)
    for encoder in (own.semantic, own.label):
        if encoder is not None:
            encoder.requires_grad_(False)
    if grown:
        unet.conv_in.requires_grad_(True)
        if unet.class_embedding is not None:
            unet.class_embedding.requires_grad_(True)


def encoders_beside(pretrained: str | None) -> ConditionEncoders:
    """The encoders of maps and labels in the folder of the pipeline whose U-Net `unet.pretrained` names."""
    folder = Path(pretrained or "")
    semantic = label = None
    with user_input("unet.pretrained", ValueError, OSError, SafetensorError):
        if pretrained is not None and (folder / SemanticEncoder.FOLDER).is_dir():
            semantic = SemanticEncoder.from_pretrained(folder)
        if pretrained is not None and (folder / LabelEncoder.FOLDER).is_dir():
            label = LabelEncoder.from_pretrained(folder)
    return ConditionEncoders(None, semantic, label)


def build_encoders(config: ConditionsConfig, source: Source, own: ConditionEncoders) -> ConditionEncoders:
    """The encoders that `config` asks for; new ones take their weights from torch's global seed.

    `own` are those of the model that is trained further, which are used where there are any; its text encoder for
    `text: {encoder: model}`. Raises `UserError` when classes are named nowhere or differ from those of its encoder.
    """
    text = own.text
    if config.text.encoder not in ("none", "model"):
        with user_input("conditions.text"):
            text = build_text_encoder(config.text)
    elif config.text.encoder == "none":
        text = None
    elif text is not None:
        text = text.requires_grad_(config.text.finetune).train(config.text.finetune)
    semantic = label = None
    with user_input("conditions", ValueError, OSError, SafetensorError):
        if config.semantic is not None:
            semantic = _semantic_encoder(config.semantic, source, own.semantic)
        if config.label is not None:
            label = _label_encoder(config.label, source, own.label)
    return ConditionEncoders(text, semantic, label)


def _semantic_encoder(config: SemanticConfig, source: Source, own: SemanticEncoder | None) -> SemanticEncoder:
    classes = read_classes(config.classes) if config.classes else source.semantic_classes
    if not classes:
        raise UserError(
            "conditions.semantic.classes: found null, and the data does not name the classes of its maps; "
            "allowed is a file with one class name a line; write one"
        )
    if config.classes and source.semantic_classes and tuple(classes) != tuple(source.semantic_classes):
        raise UserError(
            f"conditions.semantic.classes: found {', '.join(classes[:5])}, ... in {config.classes}; the data says "
            f"{', '.join(source.semantic_classes[:5])}, ...; use the same names in the same order, or leave it out"
        )
    if own is None:
        return SemanticEncoder(classes, config.channels)
    if own.classes != tuple(classes) or own.channels != config.channels:
        theirs = f"{len(own.classes)} ({', '.join(own.classes[:5])}, ...) and {own.channels}"
        found = f"{len(classes)} classes and {config.channels} channels"
        raise UserError(f"conditions.semantic: found {found}; the model was trained with {theirs}; use the same")
    return own


def _label_encoder(config: LabelConfig, source: Source, own: LabelEncoder | None) -> LabelEncoder:
    count = len(source.classes) if config.classes is None else config.classes
    if count == 0 or count < len(source.classes):
        raise UserError(
            f"conditions.label.classes: found {count}; the data has {len(source.classes)} labels; "
            "allowed is as many or more; set the number, or add labels to the data"
        )
    spare = (str(number) for number in range(len(source.classes), 2 * count) if str(number) not in source.classes)
    classes = (*source.classes, *islice(spare, count - len(source.classes)))
    if own is None:
        return LabelEncoder(classes, config.width)
    if own.classes != classes or own.width != config.width:
        raise UserError(
            f"conditions.label: found {len(classes)} classes of width {config.width}; the model was trained with "
            f"{len(own.classes)} ({', '.join(own.classes[:5])}, ...) of width {own.width}; use the same"
        )
    return own


def build_conditioned_unet(
    config: UNetConfig,
    conditions: ConditionsConfig,
    encoders: ConditionEncoders,
    own: ConditionEncoders,
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
    return adapt_unet(load_unet(config.pretrained, sample_size), config, conditions, encoders, own, latent_channels)


def adapt_unet(
    unet: UNet2DConditionModel,
    config: UNetConfig,
    conditions: ConditionsConfig,
    encoders: ConditionEncoders,
    own: ConditionEncoders,
    latent_channels: int,
) -> UNet2DConditionModel:
    """A loaded U-Net with the conditions that it lacks; `own` are the encoders that it was trained with.

    Raises UserError when it takes a condition that is not given.
    """
    spatial_channels = conditions.layout.channels(latent_channels)
    channels = own.semantic_channels
    old = SpatialLayout(inpainting=spatial_channels_of(unet) > channels, semantic_channels=channels)
    if old != conditions.layout or class_embedding_width_of(unet) != encoders.label_width:
        unet = grow(unet, old=old, new=conditions.layout, class_embedding_width=encoders.label_width)
    check_fit(unet, latent_channels, spatial_channels, encoders.context_width, encoders.label_width)
    return prepare_unet(unet, config)

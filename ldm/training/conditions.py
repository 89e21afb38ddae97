"""The conditions of a training: which there are, their encoders, and what each step tells the U-Net of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from safetensors import SafetensorError
from torch import Tensor

from conditioning.class_file import read_classes
from conditioning.conditions import choose, dropped
from conditioning.encoders import ConditionEncoders, ConditionInputs
from conditioning.inpainting import InpaintingConfig, mask_to_latents, masked_image
from conditioning.label import LabelConfig, LabelEncoder
from conditioning.semantic import SemanticConfig, SemanticEncoder
from conditioning.text import TextConfig, build_text_encoder
from ldm.data.loader import Wanted
from ldm.data.sample import UNKNOWN_CLASS, UNKNOWN_LABEL, Batch, Source
from ldm.errors import UserError, user_input
from ldm.growing import SpatialLayout, grow
from ldm.randomness import uniform_for_each
from ldm.unet import (
    UNetConfig,
    build_unet,
    check_fit,
    class_embedding_width_of,
    load_unet,
    prepare_unet,
    spatial_channels_of,
)


@dataclass(frozen=True, kw_only=True)
class ConditionsConfig:
    """What the U-Net is told besides the noisy latents and the timestep; null is a condition that it does not take.

    Each has its own `dropout`, the share of samples that go without it, drawn independently of the others: that is what
    lets each be left out, or be given a guidance scale of its own, when the model draws.
    """

    text: TextConfig = field(default_factory=TextConfig)
    semantic: SemanticConfig | None = None
    inpainting: InpaintingConfig | None = None
    label: LabelConfig | None = None

    @property
    def layout(self) -> SpatialLayout:
        """The U-Net's input channels beside the noisy latents."""
        return SpatialLayout(self.inpainting is not None, self.semantic.channels if self.semantic else 0)

    def dropouts(self) -> dict[str, float]:
        """The dropout rate of every condition that there is."""
        parts = {part.name: getattr(self, part.name) for part in fields(self)}
        if self.text.encoder == "none":
            del parts["text"]
        return {name: config.dropout for name, config in parts.items() if config is not None}


def build_encoders(config: ConditionsConfig, source: Source, pretrained: str | None = None) -> ConditionEncoders:
    """The encoders that `config` asks for; new ones take their weights from torch's global seed.

    With `pretrained`, the local folder of a pipeline whose U-Net is trained further, its own encoders of maps and
    labels are used. Raises `UserError` when classes are named nowhere or differ from those of the pretrained encoder.
    """
    text = None
    if config.text.encoder != "none":
        with user_input("conditions.text"):
            text = build_text_encoder(config.text)
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
    spatial_channels = conditions.layout.channels(latent_channels)
    if config.pretrained is None:
        return build_unet(
            config,
            latent_channels=latent_channels,
            spatial_channels=spatial_channels,
            context_width=encoders.context_width,
            sample_size=sample_size,
            class_embedding_width=encoders.label_width,
        )
    unet = load_unet(config.pretrained, sample_size)
    old = _layout_of(unet, config.pretrained)
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


def wanted_of(config: ConditionsConfig, encoders: ConditionEncoders) -> Wanted:
    """What the loader has to bring for these conditions."""
    return Wanted(
        masks=config.inpainting,
        semantic_classes=len(encoders.semantic.classes) if encoders.semantic else None,
        label_classes=len(encoders.label.classes) if encoders.label else None,
    )


def condition_inputs(
    encoders: ConditionEncoders,
    batch: Batch,
    encode_latents: Callable[[Tensor], Tensor],
    losing: dict[str, Tensor],
) -> ConditionInputs:
    """What the step tells of a batch that is on the device already.

    `losing` holds for each condition which samples go without it, bool [B] on the CPU. `encode_latents` takes the
    masked images [B, 3, H, W] in [-1, 1] to latents [B, C, h, w] as the U-Net sees them.
    """
    tokens = mask = masked_latents = semantic = labels = None
    if encoders.text is not None:
        # On the CPU, where the tokeniser works: a dropped caption is the empty one, as at generation without a prompt.
        lost = losing["text"].tolist()
        tokens = encoders.text.tokenize(["" if gone else text for text, gone in zip(batch.captions, lost, strict=True)])
    if "inpainting" in losing:
        if batch.masks is None or batch.images is None:
            raise TypeError("training on inpainting needs images and masks in the batch")
        pixel_mask = choose(~losing["inpainting"], batch.masks, torch.ones_like(batch.masks[:1]))  # [B, 1, H, W]
        masked_latents = encode_latents(masked_image(batch.images, pixel_mask))  # [B, C, h, w]
        mask = mask_to_latents(pixel_mask, *masked_latents.shape[-2:])  # [B, 1, h, w]
    if "semantic" in losing:
        if batch.semantic is None:
            raise TypeError("training on semantic maps needs maps in the batch")
        unknown = torch.full_like(batch.semantic[:1], UNKNOWN_CLASS)
        semantic = choose(~losing["semantic"], batch.semantic, unknown)  # [B, H, W]
    if "label" in losing:
        if batch.labels is None:
            raise TypeError("training on labels needs labels in the batch")
        labels = choose(~losing["label"], batch.labels, torch.full_like(batch.labels[:1], UNKNOWN_LABEL))  # [B]
    return ConditionInputs(tokens, mask, masked_latents, semantic, labels)


def draw_losing(dropouts: dict[str, float], batch: Batch, seed: int, step: int) -> dict[str, Tensor]:
    """Which samples lose which condition, bool [B] each: a function of (seed, step, position), one draw a condition."""
    return {
        name: dropped(rate, uniform_for_each(batch.positions, seed, f"dropout/{name}", step))
        for name, rate in dropouts.items()
    }

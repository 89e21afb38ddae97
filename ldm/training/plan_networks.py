"""The networks of a stage 2 config in their sizes, without the weights of the files that it names.

What cannot be read is assumed to have Stable Diffusion 1.5's size, and that is said.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from diffusers import AutoencoderKL, UNet2DConditionModel, VQModel
from transformers import CLIPTextConfig, CLIPTextModel

from autoencoder.model import Autoencoder, AutoencoderConfig, build_autoencoder, downsampling_factor, latent_channels
from conditioning.clip_tokenizer import VOCABULARY_SIZE, clip_vocabulary_tokenizer
from conditioning.encoder_folder import read_config
from conditioning.encoders import ConditionEncoders
from conditioning.folders import looks_like_hub_id
from conditioning.label import LabelEncoder
from conditioning.semantic import SemanticEncoder
from conditioning.text import TextConfig, TextEncoder, without_last_block
from ldm.data.sample import Sample, Source
from ldm.errors import user_input
from ldm.interchange.hints import NO_HINTS, hints_of_header
from ldm.interchange.parts import empty_text_model, empty_unet, empty_vae, text_layout_of
from ldm.interchange.weight_file import open_weights
from ldm.noise import NoiseConfig
from ldm.pipeline_folder import Components
from ldm.sampling import make_scheduler
from ldm.training.networks import (
    Networks,
    adapt_unet,
    build_conditioned_unet,
    build_encoders,
    networks_of,
    prepare_text,
)
from ldm.training.stage2_config import Stage2Config
from ldm.unet import UNetConfig, build_unet

_CLIP_TEXT = {"openai/clip-vit-base-patch32": (512, 12, 8), "openai/clip-vit-base-patch16": (512, 12, 8)}
_CLIP_TEXT_LARGE = (768, 12, 12)
"""Width, layers, heads of CLIP's text towers (arXiv 2103.00020, table 20); Stable Diffusion 1 has the large one."""


@dataclass
class Sketch:
    """Builds the networks; `assumed` says what was not there.

    `autoencoder` is the architecture of the one that the config names, where its folder is still to be made.
    """

    autoencoder: AutoencoderConfig | None = None
    assumed: list[str] = field(default_factory=list)

    def networks(self, config: Stage2Config, source: Source) -> Networks:
        """Networks of the right sizes and random weights, on the default device. Raises `UserError`."""
        if config.unet.attention_backend == "xformers":  # of the same memory as sdpa, and perhaps not installed here
            config = replace(config, unet=replace(config.unet, attention_backend="sdpa"))
        if config.model is not None:
            parts = self._model(config.model)
            if config.autoencoder is not None:
                parts = replace(parts, vae=self.autoencoder_at(config.autoencoder))
            return networks_of(replace(config, autoencoder=None, prior=None), parts, source)
        vae = self.autoencoder_at(str(config.autoencoder))
        conditions, text = config.conditions, None
        if conditions.text.encoder in ("clip", "openclip"):
            text = self._text_encoder(conditions.text)
            told = TextConfig(encoder="model", dropout=conditions.text.dropout, finetune=conditions.text.finetune)
            conditions = replace(conditions, text=told)
        old = Path(config.unet.pretrained or "/dev/null")
        own = ConditionEncoders(text, _semantic_encoder(old), _label_encoder(old))
        encoders = build_encoders(conditions, source, own)
        prepare_text(config.unet, encoders)
        channels = latent_channels(vae)
        if (old / "unet" / "config.json").is_file() or (old / "config.json").is_file():
            folder = old / "unet" if (old / "unet").is_dir() else old
            unet = adapt_unet(
                _of_config(UNet2DConditionModel, folder), config.unet, conditions, encoders, own, channels
            )
            return Networks(vae, encoders, unet, config.noise or NoiseConfig())
        if config.unet.pretrained is not None:
            self.assumed.append(f"unet.pretrained {config.unet.pretrained} is not here: the sizes are those of `unet`")
        unet = build_conditioned_unet(
            replace(config.unet, pretrained=None),
            conditions,
            encoders,
            own,
            latent_channels=channels,
            sample_size=config.data.resolution // downsampling_factor(vae),
        )
        return Networks(vae, encoders, unet, config.noise or NoiseConfig())

    def autoencoder_at(self, name: str) -> Autoencoder:
        """That of a folder, or of its size."""
        folder = next((f for f in (Path(name), Path(name) / "vae") if (f / "config.json").is_file()), None)
        if folder is not None:
            return _vae_of(folder)
        if self.autoencoder is None:
            self.assumed.append(f"autoencoder {name} is not here: taken to be Stable Diffusion's (KL-f8, 4 channels)")
        config = self.autoencoder or AutoencoderConfig()
        return build_autoencoder(replace(config, pretrained=None, gradient_checkpointing=False))

    def _text_encoder(self, config: TextConfig) -> TextEncoder:
        model = _openclip_tower(config) if config.encoder == "openclip" else self._clip_tower(str(config.pretrained))
        if (config.layer or ("penultimate" if config.encoder == "openclip" else "last")) == "penultimate":
            model = without_last_block(model)
        return TextEncoder(clip_vocabulary_tokenizer(config.length), model)

    def _clip_tower(self, name: str) -> CLIPTextModel:
        folder = next((f for f in (Path(name) / "text_encoder", Path(name)) if (f / "config.json").is_file()), None)
        if folder is not None:
            return CLIPTextModel(CLIPTextConfig.from_pretrained(folder, local_files_only=True))
        width, layers, heads = _CLIP_TEXT.get(name, _CLIP_TEXT_LARGE)
        if name not in _CLIP_TEXT:
            self.assumed.append(f"text encoder {name} is not here: taken to be CLIP ViT-L/14's")
        return _tower(width, layers, heads)

    def _model(self, name: str) -> Components:
        """The parts of a pipeline's folder, a run or a single file, or Stable Diffusion 1.5's."""
        folder = next((f for f in (Path(name) / "pipeline", Path(name)) if (f / "model_index.json").is_file()), None)
        if folder is None and looks_like_hub_id(name):
            folder = _downloaded(name)
        if folder is not None:
            with user_input(str(folder)):
                return _folder_parts(folder)
        if Path(name).is_file():
            with user_input(name, ValueError):
                return _file_parts(Path(name))
        self.assumed.append(f"model {name} is not here: taken to be Stable Diffusion 1.5")
        unet = build_unet(UNetConfig(), latent_channels=4, context_width=_CLIP_TEXT_LARGE[0], sample_size=64)
        return _components(build_autoencoder(AutoencoderConfig()), unet, _tower(*_CLIP_TEXT_LARGE))


def _components(
    vae: Autoencoder, unet: UNet2DConditionModel, text: CLIPTextModel | None, **encoders: Any
) -> Components:
    encoder = None
    if text is not None:
        encoder = TextEncoder(clip_vocabulary_tokenizer(text.config.max_position_embeddings), text)
    # What is predicted makes no difference to memory or speed.
    return Components(vae, unet, make_scheduler("ddim", NoiseConfig()), encoder, **encoders)


def _folder_parts(folder: Path) -> Components:
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    text = None
    if (index.get("text_encoder") or [None, None])[1] is not None:
        text = CLIPTextModel(CLIPTextConfig.from_pretrained(folder / "text_encoder", local_files_only=True))
    return _components(
        _vae_of(folder / "vae"),
        _of_config(UNet2DConditionModel, folder / "unet"),
        text,
        semantic_encoder=_semantic_encoder(folder),
        label_encoder=_label_encoder(folder),
    )


def _file_parts(path: Path) -> Components:
    """The architecture of a single file, from keys and shapes; its weights are not read."""
    with open_weights(path, allow_pickle=False) as file:
        hints = NO_HINTS.over(hints_of_header(file.metadata))
        vae, unet = empty_vae(file.shapes, hints), empty_unet(file.shapes, hints)
        text = empty_text_model(file.shapes, hints, *text_layout_of(file.shapes))
    return _components(
        AutoencoderKL.from_config(vae.config), UNet2DConditionModel.from_config(unet.config), CLIPTextModel(text.config)
    )


def _vae_of(folder: Path) -> Autoencoder:
    kind = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("_class_name")
    return _of_config(VQModel if kind == "VQModel" else AutoencoderKL, folder)


def _of_config(kind: Callable[..., Any], folder: Path) -> Any:
    return kind.from_config(kind.load_config(folder, local_files_only=True))  # type: ignore[attr-defined]


def _semantic_encoder(folder: Path) -> SemanticEncoder | None:
    place = folder / SemanticEncoder.FOLDER
    return SemanticEncoder(*read_config(place, "channels")) if place.is_dir() else None


def _label_encoder(folder: Path) -> LabelEncoder | None:
    place = folder / LabelEncoder.FOLDER
    return LabelEncoder(*read_config(place, "width")) if place.is_dir() else None


def _downloaded(name: str) -> Path | None:
    """The folder of a hub id in the local cache; the network is not asked."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(name, local_files_only=True))
    except LocalEntryNotFoundError:
        return None
    return folder if (folder / "model_index.json").is_file() else None


def _openclip_tower(config: TextConfig) -> CLIPTextModel:
    import open_clip

    settings = open_clip.get_model_config(str(config.architecture))
    with user_input("conditions.text.architecture", KeyError, TypeError):
        text = settings["text_cfg"]
        return _tower(text["width"], text["layers"], text["heads"])


def _tower(width: int, layers: int, heads: int, positions: int = 77) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=VOCABULARY_SIZE,
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            max_position_embeddings=positions,
            projection_dim=width,
        )
    )


class NoData:
    """Stands for data that is not here: nothing to read, and only as many classes as the config names."""

    def __init__(self, classes: Sequence[str], semantic_classes: Sequence[str]) -> None:
        self.classes, self.semantic_classes = tuple(classes), tuple(semantic_classes)
        self.fingerprint = ""

    def __len__(self) -> int:
        return 0

    def size(self, index: int) -> tuple[int, int]:
        """Never."""
        raise TypeError("there is no data to read")

    def read(self, index: int, *, with_image: bool = True) -> Sample:
        """Never."""
        raise TypeError("there is no data to read")

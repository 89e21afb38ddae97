"""A pipeline on disk: diffusers' folder layout, which `StableDiffusionPipeline.from_pretrained` opens and runs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
from diffusers import AutoencoderKL, SchedulerMixin, UNet2DConditionModel

from autoencoder.model import Autoencoder, latent_channels, load_autoencoder
from conditioning.label import LabelEncoder
from conditioning.semantic import SemanticEncoder
from conditioning.text import TextEncoder
from ldm.errors import UserError, user_input
from ldm.files import whole_folder
from ldm.growing import SpatialLayout
from ldm.pipeline_weights import BROKEN, check_config, check_files, choose_variant, quiet_libraries, read_unet
from ldm.sampling import make_scheduler, noise_config_of
from ldm.unet import class_embedding_width_of, spatial_channels_of

OUR_CLASS = "LatentDiffusionPipeline"
DIFFUSERS_CLASS = "StableDiffusionPipeline"
DIFFUSERS_INPAINT_CLASS = "StableDiffusionInpaintPipeline"
KNOWN_CLASSES = (DIFFUSERS_CLASS, DIFFUSERS_INPAINT_CLASS, "StableDiffusionImg2ImgPipeline", OUR_CLASS)
OUR_ENCODERS = {"semantic_encoder": SemanticEncoder, "label_encoder": LabelEncoder}
HUB_FOLDERS = ("vae", "unet", "text_encoder", "tokenizer", "scheduler", *OUR_ENCODERS)
HUB_FILES = ["model_index.json", *(f"{folder}/*" for folder in HUB_FOLDERS)]
HUB_FILES_NOT = ["*.bin", "*.ckpt", "*.msgpack", "*.onnx*", "*.fp16.*", "*.non_ema.*"]


@dataclass(frozen=True)
class Components:
    """What a pipeline is made of; an encoder that is None belongs to a condition that the model does not take."""

    vae: Autoencoder
    unet: UNet2DConditionModel
    noise_scheduler: SchedulerMixin
    text_encoder: TextEncoder | None = None
    semantic_encoder: SemanticEncoder | None = None
    label_encoder: LabelEncoder | None = None


def find_folder(path: str | Path, variant: str | None = None) -> Path:
    """The local folder of a pipeline; an `owner/name` that is no local path is downloaded from the Hugging Face hub.

    Of weights the plain files are fetched, or with `variant` those of that name.

    Raises UserError when there is no such folder and the name cannot be one of the hub's.
    """
    folder = Path(path)
    if folder.is_dir():
        if not (folder / "model_index.json").is_file():
            raise UserError(
                f"{folder}: found no model_index.json; give the folder of a pipeline, as a training run saves it"
            )
        return folder
    # `runs/demo` beside an existing `runs` is a mistyped path and not a model on the hub.
    on_hub = str(path).count("/") == 1 and not folder.is_absolute() and not folder.parent.exists()
    if not on_hub or folder.exists():
        raise UserError(f"{path}: no such folder; give the folder of a pipeline, or a Hugging Face hub id (owner/name)")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    with user_input(
        f"{path}: no such folder, and not on the hub", ValueError, OSError, HfHubHTTPError, LocalEntryNotFoundError
    ):
        files, not_those = HUB_FILES, HUB_FILES_NOT
        if variant is not None:
            files = ["model_index.json", *(f"{folder}/{name}" for folder in HUB_FOLDERS for name in _of(variant))]
            not_those = []
        return Path(snapshot_download(str(path), allow_patterns=files, ignore_patterns=not_those))


def _of(variant: str) -> tuple[str, ...]:
    """Patterns of the files that a part needs besides its weights, and of those weights."""
    return "*.json", "*.txt", f"*.{variant}.safetensors", f"*.{variant}-*.safetensors"


def read_components(folder: Path, *, variant: str | None = None) -> Components:
    """Open every part of the pipeline in `folder`, from safetensors only and with no network.

    `variant` chooses among files, as `fp16` does `*.fp16.safetensors` (see `choose_variant`).

    Raises UserError for another kind of pipeline, a missing or broken file, and parts that do not fit together.
    """
    index = check_config(folder / "model_index.json")
    kind = index.get("_class_name")
    if kind not in KNOWN_CLASSES:
        raise UserError(f"{folder}: found a {kind}; allowed is {', '.join(KNOWN_CLASSES)}")
    with user_input(f"{folder}: model_index.json", TypeError, KeyError, IndexError):
        encoder = (index.get("text_encoder") or [None, None])[1]
    if encoder not in ("CLIPTextModel", None):
        raise UserError(f"{folder}: found text encoder {encoder}; allowed is CLIPTextModel")
    parts = ["vae", "unet", *(["text_encoder"] if encoder else [])]
    chosen = choose_variant(folder, parts, variant)
    check_files(folder, parts)
    with user_input(str(folder), *BROKEN), quiet_libraries():
        vae = load_autoencoder(str(folder), subfolder="vae", variant=chosen["vae"])
        unet = read_unet(folder / "unet", chosen["unet"])
        noise_scheduler = _read_scheduler(folder / "scheduler")
        text_encoder = TextEncoder.from_pretrained(folder, variant=chosen["text_encoder"]) if encoder else None
        semantic_encoder = SemanticEncoder.from_pretrained(folder) if index.get("semantic_encoder") else None
        label_encoder = LabelEncoder.from_pretrained(folder) if index.get("label_encoder") else None
    components = Components(vae, unet, noise_scheduler, text_encoder, semantic_encoder, label_encoder)
    _check_inputs(components, folder)
    return components


def _check_inputs(components: Components, folder: Path) -> None:
    """Raise UserError unless the U-Net takes just what the other parts give: latents, mask, map, label."""
    unet, latents = components.unet, latent_channels(components.vae)
    semantic = components.semantic_encoder.channels if components.semantic_encoder is not None else 0
    allowed = [layout.channels(latents) for layout in (SpatialLayout(False, semantic), SpatialLayout(True, semantic))]
    found = spatial_channels_of(unet)
    if unet.config.out_channels != latents or found not in allowed:
        raise UserError(
            f"{folder}: found a U-Net of {unet.config.in_channels} input, {unet.config.out_channels} output channels; "
            f"allowed is {latents + allowed[0]} (latents, {semantic} of a map) or {latents + allowed[1]} (a mask and "
            f"masked latents too), and {latents}; check that its parts belong together"
        )
    _check_text(components.text_encoder, unet, folder)
    width = components.label_encoder.width if components.label_encoder is not None else None
    if class_embedding_width_of(unet) != width:
        raise UserError(
            f"{folder}: found a U-Net whose class embedding is {class_embedding_width_of(unet)} wide; the folder's "
            f"label encoder gives {width}; check that its parts belong together"
        )


def _check_text(text: TextEncoder | None, unet: UNet2DConditionModel, folder: Path) -> None:
    """Raise UserError unless tokenizer, text encoder and U-Net fit together."""
    if text is None:
        return
    if unet.config.cross_attention_dim != text.width:
        raise UserError(
            f"{folder}: found a text encoder of width {text.width} and a U-Net that reads "
            f"{unet.config.cross_attention_dim}; allowed is one width; check that its parts belong together"
        )
    largest, rows = max(text.tokenizer.get_vocab().values()), text.model.config.vocab_size
    if largest >= rows:
        raise UserError(
            f"{folder}: found a tokenizer with ids up to {largest} and a text encoder of {rows} tokens; allowed is as "
            "many; check that its parts belong together"
        )


def write_components(components: Components, folder: str | Path) -> None:
    """Save the parts to `folder` whole or not at all, as `write_parts` does; an older pipeline there is replaced.

    Raises UserError if `folder` holds something else or cannot be written.
    """
    with new_pipeline(folder) as partial:
        write_parts(components, partial)


@contextmanager
def new_pipeline(folder: str | Path) -> Iterator[Path]:
    """A new folder to write a pipeline into, which takes the place of `folder` at the end, see `whole_folder`.

    Raises UserError if `folder` holds something that is no pipeline.
    """
    folder = Path(folder).resolve()
    if folder.exists() and not (folder / "model_index.json").is_file() and (folder.is_file() or any(folder.iterdir())):
        raise UserError(
            f"{folder}: found something that is not a pipeline; allowed is a new folder; choose another name"
        )
    with whole_folder(folder) as partial:
        yield partial


def write_parts(components: Components, folder: Path) -> None:
    """Save the parts into an empty folder.

    A flow model whose scheduler diffusers' Stable Diffusion pipeline cannot run (the flow matching classes) is saved
    with DPM-Solver++, which it can. A VQ autoencoder and a missing text encoder are beyond that pipeline altogether,
    as are maps and labels: such a folder names our own class.
    """
    scheduler = components.noise_scheduler
    if not hasattr(scheduler, "init_noise_sigma"):
        scheduler = make_scheduler("dpm++", noise_config_of(scheduler))
    unet = getattr(components.unet, "_orig_mod", components.unet)  # torch.compile's wrapper is no part of the model
    components.vae.save_pretrained(folder / "vae", safe_serialization=True)
    unet.save_pretrained(folder / "unet", safe_serialization=True)
    scheduler.save_pretrained(folder / "scheduler")
    for encoder in (components.text_encoder, components.semantic_encoder, components.label_encoder):
        if encoder is not None:
            encoder.save_pretrained(folder)
    index = json.dumps(_model_index(components, scheduler), indent=2) + "\n"
    (folder / "model_index.json").write_text(index, encoding="utf-8")


def _model_index(components: Components, scheduler: SchedulerMixin) -> dict[str, Any]:
    text = components.text_encoder is not None
    ours = {name: [kind.__module__, kind.__name__] for name, kind in OUR_ENCODERS.items() if getattr(components, name)}
    runs_in_diffusers = text and isinstance(components.vae, AutoencoderKL) and not ours
    diffusers_class = DIFFUSERS_INPAINT_CLASS if spatial_channels_of(components.unet) else DIFFUSERS_CLASS
    return ours | {
        "_class_name": diffusers_class if runs_in_diffusers else OUR_CLASS,
        "_diffusers_version": diffusers.__version__,
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", type(scheduler).__name__],
        "text_encoder": ["transformers", "CLIPTextModel"] if text else [None, None],
        "tokenizer": ["transformers", "CLIPTokenizer"] if text else [None, None],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", type(components.vae).__name__],
    }


def _read_scheduler(folder: Path) -> SchedulerMixin:
    name = check_config(folder / "scheduler_config.json").get("_class_name")
    scheduler_class: Any = getattr(diffusers, str(name), None)
    known = isinstance(scheduler_class, type) and issubclass(scheduler_class, SchedulerMixin)
    if not known:
        raise UserError(f"{folder}: found scheduler {name}; allowed is a scheduler class of diffusers")
    return scheduler_class.from_pretrained(folder, local_files_only=True)

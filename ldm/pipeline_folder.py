"""A pipeline on disk: diffusers' folder layout, which `StableDiffusionPipeline.from_pretrained` opens and runs."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
from diffusers import AutoencoderKL, SchedulerMixin, UNet2DConditionModel
from safetensors import SafetensorError

from autoencoder.model import Autoencoder, latent_channels, load_autoencoder
from conditioning.label import LabelEncoder
from conditioning.semantic import SemanticEncoder
from conditioning.text import TextEncoder
from ldm.errors import UserError, user_input
from ldm.growing import SpatialLayout
from ldm.sampling import make_scheduler, noise_config_of
from ldm.unet import class_embedding_width_of, spatial_channels_of

OUR_CLASS = "LatentDiffusionPipeline"
DIFFUSERS_CLASS = "StableDiffusionPipeline"
DIFFUSERS_INPAINT_CLASS = "StableDiffusionInpaintPipeline"
KNOWN_CLASSES = (DIFFUSERS_CLASS, DIFFUSERS_INPAINT_CLASS, OUR_CLASS)
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


def find_folder(path: str | Path) -> Path:
    """The local folder of a pipeline; an `owner/name` that is no local path is downloaded from the Hugging Face hub.

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
        return Path(snapshot_download(str(path), allow_patterns=HUB_FILES, ignore_patterns=HUB_FILES_NOT))


def read_components(folder: Path) -> Components:
    """Open every part of the pipeline in `folder`, from safetensors only and with no network.

    Raises UserError for another kind of pipeline, a missing or broken file, and parts that do not fit together.
    """
    index = _read_json(folder / "model_index.json")
    kind = index.get("_class_name")
    if kind not in KNOWN_CLASSES:
        raise UserError(f"{folder}: found a {kind}; allowed is {', '.join(KNOWN_CLASSES)}")
    encoder = (index.get("text_encoder") or [None, None])[1]
    if encoder not in ("CLIPTextModel", None):
        raise UserError(f"{folder}: found text encoder {encoder}; allowed is CLIPTextModel")
    with user_input(str(folder), ValueError, OSError, SafetensorError):
        vae = load_autoencoder(str(folder), subfolder="vae", variant=_variant(folder / "vae"))
        text_encoder = None
        if encoder:
            text_encoder = TextEncoder.from_pretrained(folder, variant=_variant(folder / "text_encoder"))
        unet, report = UNet2DConditionModel.from_pretrained(
            folder / "unet",
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
            variant=_variant(folder / "unet"),
        )
        if report["missing_keys"]:  # diffusers would leave them at random values and only warn
            raise ValueError(f"unet: {len(report['missing_keys'])} weights are missing from the file; save it again")
        noise_scheduler = _read_scheduler(folder / "scheduler")
        semantic_encoder = SemanticEncoder.from_pretrained(folder) if index.get("semantic_encoder") else None
        label_encoder = LabelEncoder.from_pretrained(folder) if index.get("label_encoder") else None
    components = Components(vae, unet, noise_scheduler, text_encoder, semantic_encoder, label_encoder)
    _check_inputs(components, folder)
    return components


def _variant(part: Path) -> str | None:
    """`fp16` where the weights are there as `*.fp16.safetensors` only, as many published folders have them."""
    names = {path.name for path in part.glob("*.safetensors")}
    return "fp16" if names and all(".fp16" in name for name in names) else None


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
    width = components.label_encoder.width if components.label_encoder is not None else None
    if class_embedding_width_of(unet) != width:
        raise UserError(
            f"{folder}: found a U-Net whose class embedding is {class_embedding_width_of(unet)} wide; the folder's "
            f"label encoder gives {width}; check that its parts belong together"
        )


def write_components(components: Components, folder: str | Path) -> None:
    """Save the parts to `folder` whole or not at all; an older pipeline there is replaced.

    A flow model whose scheduler diffusers' Stable Diffusion pipeline cannot run (the flow matching classes) is saved
    with DPM-Solver++, which it can. A VQ autoencoder and a missing text encoder are beyond that pipeline altogether,
    as are maps and labels: such a folder names our own class. Raises UserError if `folder` holds something else
    or cannot be written.
    """
    folder = Path(folder).resolve()
    if folder.exists() and not (folder / "model_index.json").is_file() and (folder.is_file() or any(folder.iterdir())):
        raise UserError(
            f"{folder}: found something that is not a pipeline; allowed is a new folder; choose another name"
        )
    scheduler = components.noise_scheduler
    if not hasattr(scheduler, "init_noise_sigma"):
        scheduler = make_scheduler("dpm++", noise_config_of(scheduler))
    unet = getattr(components.unet, "_orig_mod", components.unet)  # torch.compile's wrapper is no part of the model
    with _replacing(folder) as partial:
        components.vae.save_pretrained(partial / "vae", safe_serialization=True)
        unet.save_pretrained(partial / "unet", safe_serialization=True)
        scheduler.save_pretrained(partial / "scheduler")
        for encoder in (components.text_encoder, components.semantic_encoder, components.label_encoder):
            if encoder is not None:
                encoder.save_pretrained(partial)
        index = json.dumps(_model_index(components, scheduler), indent=2) + "\n"
        (partial / "model_index.json").write_text(index, encoding="utf-8")


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
    name = _read_json(folder / "scheduler_config.json").get("_class_name")
    scheduler_class: Any = getattr(diffusers, str(name), None)
    known = isinstance(scheduler_class, type) and issubclass(scheduler_class, SchedulerMixin)
    if not known:
        raise UserError(f"{folder}: found scheduler {name}; allowed is a scheduler class of diffusers")
    return scheduler_class.from_pretrained(folder, local_files_only=True)


def _read_json(path: Path) -> dict[str, Any]:
    with user_input(str(path)):
        return json.loads(path.read_text(encoding="utf-8"))


@contextmanager
def _replacing(folder: Path) -> Iterator[Path]:
    """A new folder beside `folder` to write into, which takes its place at the end and vanishes after an error."""
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    former = folder.with_name(f".{folder.name}.{os.getpid()}.old")
    try:
        # A full disk is an OSError to Python and a SafetensorError to safetensors.
        with user_input(f"{folder}: cannot be written", OSError, SafetensorError):
            partial.mkdir(parents=True)
            yield partial
            _sync(partial)
            if folder.exists():
                folder.rename(former)
            partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if former.exists() and not folder.exists():
            former.rename(folder)
        shutil.rmtree(former, ignore_errors=True)


def _sync(folder: Path) -> None:
    """Have the disk hold every file before the rename makes them visible."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())

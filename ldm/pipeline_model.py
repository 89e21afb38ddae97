"""The parts of a latent diffusion model, on disk and in memory: what the pipeline draws with."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import torch
from diffusers import SchedulerMixin, UNet2DConditionModel
from torch import Tensor, nn

from autoencoder.latents import decode, encode, from_unet, to_unet
from autoencoder.model import Autoencoder, downsampling_factor
from conditioning.conditions import CONDITIONS, Conditions
from conditioning.encoders import ConditionEncoders
from conditioning.label import LabelEncoder
from conditioning.semantic import SemanticEncoder
from conditioning.text import TextEncoder
from ldm.device import choose_device, choose_dtype
from ldm.errors import UserError
from ldm.pipeline_folder import Components, find_folder, read_components, write_components
from ldm.pipeline_inputs import check_clip_skip, check_side
from ldm.pipeline_memory import MemorySavers
from ldm.sampling import make_scheduler, noise_config_of
from ldm.unet import denoise, spatial_channels_of

logger = logging.getLogger(__name__)


class NotFinitePicture(UserError):  # noqa: N818 - it names the thing found
    """A picture came out as NaN or Inf."""


class LatentDiffusionModel(MemorySavers):
    """A latent diffusion model: autoencoder, encoders of its conditions, U-Net and noise scheduler.

    An encoder that is None is a condition that the model does not take; `conditions` names those that it takes.
    """

    def __init__(
        self,
        vae: Autoencoder,
        text_encoder: TextEncoder | None,
        unet: UNet2DConditionModel,
        noise_scheduler: SchedulerMixin,
        *,
        semantic_encoder: SemanticEncoder | None = None,
        label_encoder: LabelEncoder | None = None,
        name: str = "",
    ) -> None:
        """Take the parts as they are: none is moved, cast or put into another mode, so a trainer may pass its own."""
        self.vae = vae
        self.text_encoder = text_encoder
        self.semantic_encoder = semantic_encoder
        self.label_encoder = label_encoder
        self.encoders = ConditionEncoders(text_encoder, semantic_encoder, label_encoder)
        self.unet = unet
        self.noise_scheduler = noise_scheduler
        self.name = name

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        dtype: str | torch.dtype = "auto",
        device: str | torch.device = "auto",
        variant: str | None = None,
    ) -> Self:
        """Open a folder that a training run or `save_pretrained` wrote, or any Stable Diffusion 1 / 2 folder.

        `path` may also be a Hugging Face hub id `owner/name`, which is then downloaded; a local folder never touches
        the network. `dtype` and `device` as in `ldm.device`, `variant` as in diffusers (`fp16`). A safety checker in
        the folder is not used. `ldm.interchange.opening.open_pipeline` opens runs and single files too. Raises
        UserError.
        """
        device = choose_device(device)
        dtype = choose_dtype(dtype, device)  # what is not there is told before any file is read
        name = Path(path).resolve().name if Path(path).exists() else str(path)
        parts = read_components(find_folder(path, variant), variant=variant)
        return cls.from_components(parts, name=name, dtype=dtype, device=device)

    @classmethod
    def from_components(
        cls, parts: Components, *, name: str, dtype: str | torch.dtype = "auto", device: str | torch.device = "auto"
    ) -> Self:
        """A model of parts that were read already, moved to `device` and cast to `dtype` (as in `ldm.device`)."""
        device = choose_device(device)
        model = cls(
            parts.vae,
            parts.text_encoder,
            parts.unet,
            parts.noise_scheduler,
            semantic_encoder=parts.semantic_encoder,
            label_encoder=parts.label_encoder,
            name=name,
        )
        return model.to(device, choose_dtype(dtype, device))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the folder that our and diffusers' `from_pretrained` open, whole or not at all. Raises UserError."""
        encoders = (self.text_encoder, self.semantic_encoder, self.label_encoder)
        write_components(Components(self.vae, self.unet, self.noise_scheduler, *encoders), folder)

    def to(self, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> Self:
        """Move and cast all networks in place; convolutions are laid out channels last, as CPUs and CUDA like them."""
        for network in self.networks():
            nn.Module.to(network, device, dtype)  # diffusers' own `to` warns about an empty list of modules
        if self.device.type in ("cpu", "cuda"):
            self.unet.to(memory_format=torch.channels_last)
            self.vae.to(memory_format=torch.channels_last)
        return self

    @property
    def device(self) -> torch.device:
        """Where the U-Net computes."""
        return self.execution_device or next(self.unet.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """What the U-Net computes in."""
        return next(self.unet.parameters()).dtype

    @property
    def conditions(self) -> tuple[str, ...]:
        """Which of inpainting, semantic, label and text the model takes, in this order."""
        takes = {
            "inpainting": spatial_channels_of(self.unet) > self.encoders.semantic_channels,
            "semantic": self.semantic_encoder is not None,
            "label": self.label_encoder is not None,
            "text": self.text_encoder is not None,
        }
        return tuple(name for name in CONDITIONS if takes[name])

    @property
    def is_flow(self) -> bool:
        """Whether it was trained with flow matching, which other schedulers run."""
        return noise_config_of(self.noise_scheduler).prediction == "flow"

    @property
    def factor(self) -> int:
        """Pixels to a latent: sides of pictures are multiples of it."""
        return downsampling_factor(self.vae)

    @property
    def default_size(self) -> tuple[int, int]:
        """(height, width) in pixels of the images that the model was made for."""
        size = self.unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return height * self.factor, width * self.factor

    def resolve_size(self, height: int | None = None, width: int | None = None) -> tuple[int, int]:
        """(height, width) with defaults filled in; raises UserError, naming the nearest sizes, for one that is none."""
        default_height, default_width = self.default_size
        return (
            check_side("height", default_height if height is None else height, self.factor),
            check_side("width", default_width if width is None else width, self.factor),
        )

    def make_scheduler(self, scheduler: str | SchedulerMixin | None = None) -> SchedulerMixin:
        """The scheduler called `scheduler` for this model's noise; None is the model's own."""
        if isinstance(scheduler, str):
            return make_scheduler(scheduler, noise_config_of(self.noise_scheduler))
        return self.noise_scheduler if scheduler is None else scheduler

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str], clip_skip: int = 0) -> Conditions:
        """What the U-Net is told of the prompts: context [B, L, C] in its type; nothing if the model has no text."""
        if self.text_encoder is None:
            return Conditions()
        tokens = self.text_encoder.tokenize(prompts).to(self.device)  # [B, L]
        context = self.text_encoder(tokens, check_clip_skip(self.text_encoder, clip_skip))
        return Conditions(context=context.to(self.dtype))

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [-1, 1] -> the posterior's mean as the U-Net sees it, [B, C, h, w], float32."""
        moments = encode(self.vae, images.to(self.device, self.vae.dtype))
        return to_unet(self.vae, moments.mean).float()

    @torch.no_grad()
    def predict(self, latents: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
        """What the U-Net predicts, [B, C, h, w]; no guidance."""
        return denoise(self.unet, latents.to(self.dtype), timesteps, conditions)

    @torch.no_grad()
    def decode_latents(self, latents: Tensor) -> Tensor:
        """Latents as the U-Net sees them [B, C, h, w] -> images [B, 3, H, W] in [-1, 1], float32.

        An image that overflows in half precision, as those of SDXL's autoencoder do, is decoded again in fp32, with a
        line that says so. Raises NotFinitePicture for a picture that is not finite all the same.
        """
        images = decode(self.vae, from_unet(self.vae, latents.to(self.vae.dtype))).float()
        halved = self.vae.dtype != torch.float32 or torch.is_autocast_enabled(latents.device.type)
        # Those alone: an image must not depend on the batch that it was made in.
        overflowed = _finite(latents) & ~_finite(images)  # [B]
        if halved and overflowed.any():
            logger.warning(
                "the autoencoder overflowed in half precision; %d of %d images are decoded in fp32 instead",
                int(overflowed.sum()),
                len(images),
            )
            images[overflowed] = self._decode_in_fp32(latents[overflowed])
        if _finite(images).all():
            return images
        cause = "the autoencoder gives it of good latents, in fp32 too; look at its weights (vae)"
        if not _finite(latents).all():
            cause = "the U-Net's latents are so; lower the guidance scale, or compute in fp32 (dtype)"
        raise NotFinitePicture(f"the picture came out as NaN or Inf: {cause}")

    def _decode_in_fp32(self, latents: Tensor) -> Tensor:
        dtype = self.vae.dtype
        try:
            with torch.autocast(latents.device.type, enabled=False):
                nn.Module.to(self.vae, torch.float32)  # diffusers' own `to` warns of an empty list
                return decode(self.vae, from_unet(self.vae, latents.float()))
        finally:
            nn.Module.to(self.vae, dtype)  # it came from there, so nothing is lost

    def networks(self) -> list[nn.Module]:
        """All that has weights."""
        return [self.vae, self.encoders, self.unet]


def _finite(tensor: Tensor) -> Tensor:
    """Which entries of a batch hold finite numbers alone, bool [B]."""
    return tensor.isfinite().flatten(1).all(dim=1)

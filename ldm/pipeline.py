"""LatentDiffusionPipeline: from prompts to pictures, with diffusers' names and meanings."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from diffusers import SchedulerMixin, UNet2DConditionModel
from PIL import Image
from torch import Tensor, nn

from autoencoder.latents import decode, from_unet
from autoencoder.model import Autoencoder, downsampling_factor, latent_channels
from conditioning.conditions import Conditions
from conditioning.text import TextEncoder
from ldm.device import choose_device, choose_dtype
from ldm.errors import UserError
from ldm.guidance import ClassifierFreeGuidance, Denoiser, check_guidance_scale
from ldm.picture import to_numpy, to_pil, to_unit
from ldm.pipeline_folder import Components, find_folder, read_components, write_components
from ldm.pipeline_inputs import batches, check_generators, check_prompts, check_side
from ldm.sampling import initial_latents, make_scheduler, noise_config_of, sample, set_timesteps
from ldm.unet import denoise

logger = logging.getLogger(__name__)

OutputType = Literal["pil", "np", "pt", "latent"]
StepEnd = Callable[["LatentDiffusionPipeline", int, Tensor, dict[str, Any]], dict[str, Any] | None]
"""diffusers' callback_on_step_end(pipeline, step, timestep, {"latents": ...}) -> a dict, whose "latents" are used."""


@dataclass(frozen=True)
class LatentDiffusionOutput:
    """The result of a call.

    Attributes:
        images: in the order of the prompts, those of one prompt together. "pil": RGB pictures; "np": float32
            [B, H, W, 3] in [0, 1]; "pt": float32 [B, 3, H, W] in [0, 1]; "latent": float32 x_0 [B, C, h, w], as the
            U-Net sees it.
        seeds: by which each image is drawn again alone; None if the caller gave generators.
    """

    images: Any
    seeds: tuple[int, ...] | None


class LatentDiffusionPipeline:
    """A text-to-image model: autoencoder, text encoder (or None), U-Net and noise scheduler."""

    def __init__(
        self,
        vae: Autoencoder,
        text_encoder: TextEncoder | None,
        unet: UNet2DConditionModel,
        noise_scheduler: SchedulerMixin,
        name: str = "",
    ) -> None:
        """Take the parts as they are: none is moved, cast or put into another mode, so a trainer may pass its own."""
        self.vae = vae
        self.text_encoder = text_encoder
        self.unet = unet
        self.noise_scheduler = noise_scheduler
        self.name = name

    @classmethod
    def from_pretrained(
        cls, path: str | Path, *, dtype: str | torch.dtype = "auto", device: str | torch.device = "auto"
    ) -> LatentDiffusionPipeline:
        """Open a folder that a training run or `save_pretrained` wrote, or any Stable Diffusion 1 / 2 folder.

        `path` may also be a Hugging Face hub id `owner/name`, which is then downloaded; a local folder never touches
        the network. `dtype` and `device` as in `ldm.device`. A safety checker in the folder is not used. Raises
        UserError.
        """
        device = choose_device(device)
        dtype = choose_dtype(dtype, device)
        parts = read_components(find_folder(path))
        name = Path(path).resolve().name if Path(path).exists() else str(path)
        pipeline = cls(parts.vae, parts.text_encoder, parts.unet, parts.noise_scheduler, name=name)
        return pipeline.to(device, dtype)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the folder that our and diffusers' `from_pretrained` open, whole or not at all. Raises UserError."""
        write_components(Components(self.vae, self.text_encoder, self.unet, self.noise_scheduler), folder)

    def to(self, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> LatentDiffusionPipeline:
        """Move and cast all networks in place; convolutions are laid out channels last, as CPUs and CUDA like them."""
        for network in self._networks():
            nn.Module.to(network, device, dtype)  # diffusers' own `to` warns about an empty list of modules
        if self.device.type in ("cpu", "cuda"):
            self.unet.to(memory_format=torch.channels_last)
            self.vae.to(memory_format=torch.channels_last)
        return self

    @property
    def device(self) -> torch.device:
        """Where the U-Net is."""
        return next(self.unet.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """What the U-Net computes in."""
        return next(self.unet.parameters()).dtype

    @property
    def default_size(self) -> tuple[int, int]:
        """(height, width) in pixels of the images that the model was made for."""
        size = self.unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        factor = downsampling_factor(self.vae)
        return height * factor, width * factor

    def resolve_size(self, height: int | None = None, width: int | None = None) -> tuple[int, int]:
        """(height, width) with defaults filled in; raises UserError, naming the nearest sizes, for one that is none."""
        factor = downsampling_factor(self.vae)
        default_height, default_width = self.default_size
        return (
            check_side("height", default_height if height is None else height, factor),
            check_side("width", default_width if width is None else width, factor),
        )

    def make_scheduler(self, scheduler: str | SchedulerMixin | None = None) -> SchedulerMixin:
        """The scheduler called `scheduler` for this model's noise; None is the model's own."""
        if isinstance(scheduler, str):
            return make_scheduler(scheduler, noise_config_of(self.noise_scheduler))
        return self.noise_scheduler if scheduler is None else scheduler

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        negative_prompt: str | Sequence[str] | None = None,
        *,
        num_inference_steps: int = 30,
        guidance_scale: float = 5.0,
        num_images_per_prompt: int = 1,
        height: int | None = None,
        width: int | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        seed: int | Sequence[int] | None = None,
        latents: Tensor | None = None,
        scheduler: str | SchedulerMixin | None = None,
        output_type: OutputType = "pil",
        callback_on_step_end: StepEnd | None = None,
        batch_size: int | None = None,
    ) -> LatentDiffusionOutput:
        """Draw `num_images_per_prompt` pictures of each prompt.

        Args:
            prompt: one or several; what does not fit the text window is cut, with a warning that says what.
            negative_prompt: what to steer away from, one for all or one for each prompt; "" if None.
            num_inference_steps: 1 to the number of training timesteps.
            guidance_scale: 1 is none; higher follows the prompt more closely (see `ClassifierFreeGuidance`). 5 suits
                most models; diffusers' default is 7.5.
            height, width: pixels, multiples of the autoencoder's downsampling; default `default_size`.
            generator: one for each image, or a single one that draws for all of them in turn, as in diffusers.
            seed: image i is drawn from seed + i, or from the i-th of several, whatever the batch; random if None.
            latents: [number of images, C, h, w], standard normal, in place of drawn noise.
            scheduler: a name in `ldm.sampling.SCHEDULERS` or a diffusers scheduler; default the model's own.
            output_type: see `LatentDiffusionOutput`.
            callback_on_step_end: called after every step of every batch with (pipeline, step, timestep, {"latents"}).
            batch_size: how many images to draw at once; all of them if None.

        Raises:
            UserError: for an argument that cannot be used; it names the allowed values.
        """
        if output_type not in get_args(OutputType):
            raise UserError(f"output_type: found {output_type!r}; allowed is {', '.join(get_args(OutputType))}")
        check_guidance_scale(guidance_scale)
        prompts, negatives = check_prompts(self.text_encoder, prompt, negative_prompt, num_images_per_prompt)
        seeds, generators = check_generators(generator, seed, len(prompts))
        noise = self._noise(latents, generators, len(prompts), height, width)
        noise_scheduler = self.make_scheduler(scheduler)
        set_timesteps(noise_scheduler, num_inference_steps)  # an impossible number is told before any work
        results = []
        with _evaluation_mode(*self._networks()):
            for part in batches(len(prompts), batch_size):
                x_0 = sample(
                    self._denoiser(negatives[part], guidance_scale),
                    noise_scheduler,
                    noise[part].to(self.device),
                    self.encode_prompts(prompts[part]),
                    num_inference_steps,
                    generators if isinstance(generators, torch.Generator) else generators[part],
                    self._step_callback(callback_on_step_end),
                )
                results.append(x_0 if output_type == "latent" else self.decode_latents(x_0))
        return LatentDiffusionOutput(_as_output(torch.cat(results), output_type), seeds)

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Conditions:
        """What the U-Net is told of the prompts: context [B, L, C] in its type; nothing if the model has no text."""
        if self.text_encoder is None:
            return Conditions()
        tokens = self.text_encoder.tokenize(prompts).to(self.device)  # [B, L]
        return Conditions(context=self.text_encoder(tokens).to(self.dtype))

    @torch.no_grad()
    def decode_latents(self, latents: Tensor) -> Tensor:
        """Latents as the U-Net sees them [B, C, h, w] -> images [B, 3, H, W] in [-1, 1], float32."""
        raw = from_unet(self.vae, latents.to(self.vae.dtype))
        images = decode(self.vae, raw).float()
        if self.vae.dtype != torch.float16 or images.isfinite().all():
            return images
        logger.warning("the autoencoder overflowed in fp16; this batch is decoded in fp32")
        try:
            return decode(self.vae.to(torch.float32), from_unet(self.vae, latents.float()))
        finally:
            self.vae.to(torch.float16)

    def _networks(self) -> list[nn.Module]:
        return [part for part in (self.vae, self.text_encoder, self.unet) if part is not None]

    def _denoiser(self, negatives: Sequence[str], guidance_scale: float) -> Denoiser:
        def denoiser(latents: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
            return denoise(self.unet, latents.to(self.dtype), timesteps, conditions)

        # Without a text encoder both halves of the guidance would be equal.
        if self.text_encoder is None or guidance_scale == 1:
            return denoiser
        return ClassifierFreeGuidance(denoiser, self.encode_prompts(negatives), guidance_scale)

    def _step_callback(self, callback: StepEnd | None) -> Callable[[int, Tensor, Tensor], Tensor | None] | None:
        if callback is None:
            return None
        return lambda step, t, latents: (callback(self, step, t, {"latents": latents}) or {}).get("latents")

    def _noise(
        self,
        latents: Tensor | None,
        generators: torch.Generator | list[torch.Generator],
        count: int,
        height: int | None,
        width: int | None,
    ) -> Tensor:
        """The noise that each image starts from, [count, C, h, w]."""
        factor = downsampling_factor(self.vae)
        if latents is not None and latents.ndim == 4:
            height, width = height or latents.shape[2] * factor, width or latents.shape[3] * factor
        height, width = self.resolve_size(height, width)
        shape = (latent_channels(self.vae), height // factor, width // factor)
        if latents is not None:
            if latents.shape != (count, *shape):
                raise UserError(f"latents: found shape {list(latents.shape)}; allowed is {[count, *shape]}")
            return latents
        if isinstance(generators, torch.Generator):
            return torch.randn(count, *shape, generator=generators, device=generators.device)
        return initial_latents(generators, shape)


def _as_output(tensor: Tensor, output_type: OutputType) -> list[Image.Image] | np.ndarray | Tensor:
    if output_type == "latent":
        return tensor
    if output_type == "pt":
        return to_unit(tensor)
    return to_numpy(tensor) if output_type == "np" else to_pil(tensor)


@contextmanager
def _evaluation_mode(*networks: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; afterwards every module is in the mode it was in, so a trainer may draw in between."""
    modes = [(module, module.training) for network in networks for module in network.modules()]
    try:
        for network in networks:
            network.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training

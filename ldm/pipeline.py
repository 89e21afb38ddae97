"""LatentDiffusionPipeline: from prompts, pictures, masks and maps to pictures, with diffusers' names and meanings."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from diffusers import SchedulerMixin
from PIL import Image
from torch import Tensor, nn

from autoencoder.model import latent_channels
from conditioning.conditions import Conditions
from ldm.canvas import InpaintingOptions
from ldm.data.images import to_tensor
from ldm.errors import UserError
from ldm.guidance import Guidance, GuidanceOptions, resolve_scales
from ldm.noise import NoiseSchedule
from ldm.picture import to_numpy, to_pil, to_unit
from ldm.pipeline_conditions import blends_latents, draw_noise, known_of, tell
from ldm.pipeline_inputs import batches, check_generators
from ldm.pipeline_model import LatentDiffusionModel
from ldm.pipeline_request import ImageInput, LabelInput, MapInput, Request, make_request
from ldm.sampling import noise_config_of, sample, set_timesteps, starting_step

InpaintingWay = Literal["mask channels", "latent blending", "mask channels and latent blending"]
OutputType = Literal["pil", "np", "pt", "latent"]
StepEnd = Callable[["LatentDiffusionPipeline", int, Tensor, dict[str, Any]], dict[str, Any] | None]
"""diffusers' callback_on_step_end(pipeline, step, timestep, {"latents": ...}) -> a dict, whose "latents" are used."""
NO_GUIDANCE_OPTIONS, WHOLE_PICTURE = GuidanceOptions(), InpaintingOptions()
IMAGE_TO_IMAGE_STRENGTH = 0.8


@dataclass(frozen=True)
class LatentDiffusionOutput:
    """The result of a call.

    Attributes:
        images: in the order of the prompts, those of one prompt together. "pil": RGB pictures; "np": float32
            [B, H, W, 3] in [0, 1]; "pt": float32 [B, 3, H, W] in [0, 1]; "latent": float32 x_0 [B, C, h, w], as the
            U-Net sees it.
        seeds: by which each image is drawn again alone; None if the caller gave generators.
        inpainting: how a mask was used: by the "mask channels" of a network that was trained with masks, by "latent
            blending", or by both; None without a mask.
        evaluations_per_step: how often the network is evaluated for each image and step (see `Guidance`).
    """

    images: Any
    seeds: tuple[int, ...] | None
    inpainting: InpaintingWay | None = None
    evaluations_per_step: int = 1


class LatentDiffusionPipeline(LatentDiffusionModel):
    """A latent diffusion model that draws; see `LatentDiffusionModel` for its parts, loading and saving."""

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] = "",
        negative_prompt: str | Sequence[str] | None = None,
        *,
        image: ImageInput | None = None,
        mask_image: ImageInput | None = None,
        semantic_map: MapInput | None = None,
        label: LabelInput | None = None,
        strength: float | None = None,
        inpainting: InpaintingOptions = WHOLE_PICTURE,
        num_inference_steps: int = 30,
        guidance_scale: float | Mapping[str, float] = 5.0,
        guidance: GuidanceOptions = NO_GUIDANCE_OPTIONS,
        num_images_per_prompt: int = 1,
        height: int | None = None,
        width: int | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        seed: int | Sequence[int] | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        clip_skip: int | None = None,
        scheduler: str | SchedulerMixin | None = None,
        output_type: OutputType = "pil",
        callback_on_step_end: StepEnd | None = None,
        batch_size: int | None = None,
    ) -> LatentDiffusionOutput:
        """Draw `num_images_per_prompt` pictures of each prompt.

        Every condition may be left out; one that is given once serves for all prompts.

        Args:
            prompt: one or several; what does not fit the text window is cut, with a warning that says what.
            negative_prompt: what to steer away from, one for all or one for each prompt; "" if None.
            image: RGB pictures to start from (image-to-image), or to repaint where there is a mask.
            mask_image: mode L, of the image's size; white = repaint. Where it is black the picture keeps its bytes.
            semantic_map: index maps (palette or grey pictures, arrays, int64 tensors [H, W]), 255 = unknown.
            label: class numbers or names; None in a list is unknown.
            strength: (0, 1], how much of the image is drawn anew; default 0.8, with a mask 1.
            inpainting: how the mask is used, see `InpaintingOptions`.
            num_inference_steps: 1 to the number of training timesteps; with `strength` that share of them is done.
            guidance_scale: 1 is none; higher follows the conditions more closely. One number for all of them but
                inpainting, or {"text": 7, "semantic": 2} (see `Guidance`, `resolve_scales`). 5 suits most models;
                diffusers' default is 7.5.
            guidance: interval, rescale, adaptive projection.
            height, width: pixels, multiples of `factor`; default the image's own size, else `default_size`.
            generator: one for each image, or a single one that draws for all of them in turn, as in diffusers.
            seed: image i is drawn from seed + i, or from the i-th of several, whatever the batch; random if None.
            latents: [number of images, C, h, w], standard normal, in place of drawn noise.
            prompt_embeds: [number of prompts, L, C], in place of the prompts' encoding.
            clip_skip: how many of the text encoder's last blocks the prompt leaves out, as in diffusers: 1 is A1111's
                "Clip skip: 2". The negative prompt goes through all of them, there too.
            scheduler: a name in `ldm.sampling.SCHEDULERS` or a diffusers scheduler; default the model's own.
            output_type: see `LatentDiffusionOutput`.
            callback_on_step_end: called after every step of every batch with (pipeline, step, timestep, {"latents"}).
            batch_size: how many images to draw at once; all of them if None.

        Raises:
            UserError: for an argument that cannot be used; it names the allowed values.
        """
        if latents is not None and latents.ndim == 4 and image is None:
            height, width = height or latents.shape[2] * self.factor, width or latents.shape[3] * self.factor
        request = make_request(
            self,
            prompt=prompt,
            negative_prompt=negative_prompt,
            prompt_embeds=prompt_embeds,
            clip_skip=clip_skip,
            image=image,
            mask_image=mask_image,
            semantic_map=semantic_map,
            label=label,
            inpainting=inpainting,
            height=height,
            width=width,
            repeats=num_images_per_prompt,
        )
        return self.draw(
            request,
            strength=strength,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            guidance=guidance,
            generator=generator,
            seed=seed,
            latents=latents,
            scheduler=scheduler,
            output_type=output_type,
            callback_on_step_end=callback_on_step_end,
            batch_size=batch_size,
        )

    @torch.no_grad()
    def draw(
        self,
        request: Request,
        *,
        strength: float | None = None,
        num_inference_steps: int = 30,
        guidance_scale: float | Mapping[str, float] = 5.0,
        guidance: GuidanceOptions = NO_GUIDANCE_OPTIONS,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        seed: int | Sequence[int] | None = None,
        latents: Tensor | None = None,
        scheduler: str | SchedulerMixin | None = None,
        output_type: OutputType = "pil",
        callback_on_step_end: StepEnd | None = None,
        batch_size: int | None = None,
    ) -> LatentDiffusionOutput:
        """Draw what `make_request` made of a call's prompts and pictures; the arguments are that call's."""
        if output_type not in get_args(OutputType):
            raise UserError(f"output_type: found {output_type!r}; allowed is {', '.join(get_args(OutputType))}")
        sizes = {canvas.original.size for canvas in request.canvases or ()}
        if output_type in ("np", "pt") and len(sizes) > 1:
            raise UserError(f"output_type: found {output_type} for pictures of sizes {sorted(sizes)}; allowed is pil")
        # Outside the network's own conditions a mask is no condition: it is held to by blending.
        scales = resolve_scales(guidance_scale, request.given() & set(self.conditions))
        strength = _strength(request, strength)
        noise_scheduler = self.make_scheduler(scheduler)
        set_timesteps(noise_scheduler, num_inference_steps)  # an impossible number is told before any work
        starting_step(num_inference_steps, strength)  # and so is an impossible strength
        seeds, generators = check_generators(generator, seed, len(request))
        noise = self._noise(latents, generators, request)
        callback = self._step_callback(callback_on_step_end)
        results, evaluations = [], 1
        with _evaluation_mode(*self.networks()):
            for part in batches(len(request), batch_size):
                of_part = generators if isinstance(generators, torch.Generator) else generators[part]
                told = tell(self, request[part], tuple(scales))
                denoiser = self._guided(told[:-1], list(scales.values()), guidance, noise_scheduler)
                evaluations = denoiser.evaluations_per_step
                x_0 = sample(
                    denoiser,
                    noise_scheduler,
                    noise[part].to(self.device),
                    told[-1],
                    num_inference_steps,
                    of_part,
                    callback,
                    known_of(self, request[part], strength, of_part),
                )
                results.append(x_0 if output_type == "latent" else self.decode_latents(x_0))
        images = _as_output(_stitched(torch.cat(results), request, output_type), output_type)
        return LatentDiffusionOutput(images, seeds, self._way(request), evaluations)

    def _way(self, request: Request) -> InpaintingWay | None:
        if request.canvases is None:
            return None
        if "inpainting" not in self.conditions:
            return "latent blending"
        return "mask channels and latent blending" if blends_latents(self, request) else "mask channels"

    def _guided(
        self,
        without: Sequence[Conditions],
        scales: Sequence[float],
        options: GuidanceOptions,
        noise_scheduler: SchedulerMixin,
    ) -> Guidance:
        """The network under guidance; a new one for each batch, since APG remembers steps."""
        schedule = None
        if options.interval != NO_GUIDANCE_OPTIONS.interval or options.apg is not None:
            schedule = NoiseSchedule.from_config(noise_config_of(noise_scheduler)).to(self.device)
        return Guidance(self.predict, without, scales, options, noise_schedule=schedule)

    def _step_callback(self, callback: StepEnd | None) -> Callable[[int, Tensor, Tensor], Tensor | None] | None:
        if callback is None:
            return None
        return lambda step, t, latents: (callback(self, step, t, {"latents": latents}) or {}).get("latents")

    def _noise(
        self, latents: Tensor | None, generators: torch.Generator | list[torch.Generator], request: Request
    ) -> Tensor:
        """The noise that each image starts from, [N, C, h, w]."""
        shape = (len(request), latent_channels(self.vae), request.height // self.factor, request.width // self.factor)
        if latents is None:
            return draw_noise(generators, shape)
        if latents.shape != shape:
            raise UserError(f"latents: found shape {list(latents.shape)}; allowed is {list(shape)}")
        return latents


def _strength(request: Request, strength: float | None) -> float:
    if strength is None:
        return IMAGE_TO_IMAGE_STRENGTH if request.images is not None else 1.0
    if request.images is None and request.canvases is None:
        raise UserError(f"strength: found {strength} without an image; allowed is none; give the image to start from")
    return strength


def _stitched(images: Tensor, request: Request, output_type: OutputType) -> Tensor | list[Image.Image]:
    """Images with what the mask keeps put back, byte for byte, at the size of the picture that was given."""
    if request.canvases is None or output_type == "latent":
        return images
    return [canvas.compose(picture) for canvas, picture in zip(request.canvases, to_pil(images), strict=True)]


def _as_output(images: Tensor | list[Image.Image], output_type: OutputType) -> list[Image.Image] | np.ndarray | Tensor:
    if isinstance(images, list):
        if output_type == "pil":
            return images
        images = torch.stack([to_tensor(image) for image in images])
    if output_type == "latent":
        return images
    if output_type == "pt":
        return to_unit(images)
    return to_numpy(images) if output_type == "np" else to_pil(images)


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

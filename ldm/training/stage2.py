"""Stage 2: one step of the latent U-Net, and how it is watched while it trains."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from autoencoder.latents import Moments, encode, to_unet
from autoencoder.model import Autoencoder
from conditioning.conditions import Conditions, dropped
from conditioning.text import TextConfig, TextEncoder
from ldm.data.fixed_batches import distinct_captions, fixed_samples
from ldm.data.latent_cache import CacheConfig
from ldm.data.sample import Batch, Source
from ldm.data.sources import DataConfig
from ldm.noise import NoiseConfig, NoiseSchedule, add_noise, training_target
from ldm.objective import ObjectiveConfig, diffusion_loss, loss_weights, timesteps_from_uniforms
from ldm.picture import grid
from ldm.pipeline import LatentDiffusionPipeline
from ldm.randomness import normal_for_each, uniform_for_each
from ldm.sampling import make_scheduler
from ldm.training.learner import Learner, OptimiserConfig
from ldm.training.loop import FREE_TO_CHANGE, TrainingConfig, Validation
from ldm.training.run import Run, RuntimeConfig
from ldm.unet import UNetConfig, denoise

VALIDATION_STEP = -1
"""The step number of validation's random draws: training counts from 0."""
VALIDATION_BATCH = 16


@dataclass(frozen=True, kw_only=True)
class ConditionsConfig:
    """What the U-Net is told besides the noisy latents and the timestep."""

    text: TextConfig = field(default_factory=TextConfig)


@dataclass(frozen=True, kw_only=True)
class PreviewConfig:
    """Pictures drawn while training, from fixed prompts and seeds, and the validation loss."""

    prompts: tuple[str, ...] = ()  # empty: `count` captions of the validation data
    count: int = 8
    num_inference_steps: int = 25
    guidance_scale: float = 4.0
    scheduler: str = "ddim"
    loss_images: int = 64  # validation images whose loss is measured at fixed noise and timesteps; 0 = none

    def __post_init__(self) -> None:
        if self.count < 1 or self.num_inference_steps < 1 or self.loss_images < 0:
            raise ValueError(f"count: found {self.count}; allowed is 1 or more, as for num_inference_steps")


@dataclass(frozen=True, kw_only=True)
class Stage2Config:
    """Everything that `train_ldm.py` reads."""

    out: str
    autoencoder: str  # the folder that stage 1 saved, or the `vae` of a Stable Diffusion folder
    data: DataConfig
    training: TrainingConfig
    seed: int = 0
    validation_data: DataConfig | None = None  # null: previews and validation loss are of training data
    conditions: ConditionsConfig = field(default_factory=ConditionsConfig)
    unet: UNetConfig = field(default_factory=UNetConfig)
    noise: NoiseConfig = field(default_factory=NoiseConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optimiser: OptimiserConfig = field(default_factory=OptimiserConfig)
    ema_decay: float = 0.9999  # after a warm-up of min(decay, (1 + n) / (10 + n)); 0 = none
    cache: CacheConfig = field(default_factory=CacheConfig)
    preview: PreviewConfig = field(default_factory=PreviewConfig)
    compile: bool = False  # torch.compile of the U-Net: minutes at the start, a faster step afterwards
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)

    free_to_change: ClassVar[tuple[str, ...]] = (
        *FREE_TO_CHANGE,
        "validation_",
        "preview",
        "cache.batch",
        "cache.workers",
    )

    def __post_init__(self) -> None:
        if self.cache.enabled and self.data.crop == "random":
            raise ValueError(
                "data.crop: found random with cache.enabled true; cached latents are of one fixed crop; "
                "set data.crop=center or cache.enabled=false"
            )


class DiffusionStep(nn.Module):
    """The whole loss in one forward, so that data parallelism sees the gradients of U-Net and text encoder alike."""

    def __init__(
        self,
        unet: UNet2DConditionModel,
        trained_text_encoder: TextEncoder | None,
        noise: NoiseConfig,
        objective: ObjectiveConfig,
        schedule: NoiseSchedule,
    ) -> None:
        super().__init__()
        self.unet = unet
        self.text_encoder = trained_text_encoder
        self._noise_config, self._objective = noise, objective
        self._schedule = schedule

    def forward(
        self, latents: Tensor, noise: Tensor, timesteps: Tensor, conditions: Conditions, tokens: Tensor | None
    ) -> Tensor:
        """Loss of each sample, [B].

        latents, noise: [B, C, h, w], latents as the U-Net sees them; timesteps [B]; tokens [B, L] where the text
        encoder is trained with the U-Net, otherwise the text is in `conditions` already.
        """
        if self.text_encoder is not None:
            conditions = Conditions(self.text_encoder(tokens), conditions.spatial, conditions.class_embedding)
        levels = self._schedule.levels(timesteps)
        noisy_latents = add_noise(latents, noise, levels)  # [B, C, h, w]
        output = denoise(self.unet, noisy_latents, timesteps, conditions)  # [B, C, h, w]
        target = training_target(self._noise_config.prediction, latents, noise, levels)
        weights = loss_weights(self._objective, self._noise_config, levels.snr)  # [B]
        return diffusion_loss(output, target, weights, self._objective.loss)


class DiffusionStage:
    """What the loop calls: a batch to latents, noise and conditions, then the step; and previews."""

    def __init__(
        self,
        config: Stage2Config,
        run: Run,
        autoencoder: Autoencoder,
        text_encoder: TextEncoder | None,
        unet: UNet2DConditionModel,
        validation_source: Source,
    ) -> None:
        self.config, self.run = config, run
        self.autoencoder, self.text_encoder, self.unet = autoencoder, text_encoder, unet
        self._validation_source = validation_source
        self._trains_text = text_encoder is not None and config.conditions.text.train
        device = run.accelerator.device
        if config.runtime.channels_last:
            unet.to(memory_format=torch.channels_last)
            autoencoder.to(memory_format=torch.channels_last)
        for frozen in (autoencoder, None if self._trains_text else text_encoder):
            if frozen is not None:
                frozen.requires_grad_(False).eval().to(device)
        if config.compile:
            unet.compile()
        schedule = NoiseSchedule.from_config(config.noise).to(device)
        trained_text_encoder = text_encoder if self._trains_text else None
        step = DiffusionStep(unet, trained_text_encoder, config.noise, config.objective, schedule)
        self.learner = Learner(
            "unet",
            step,
            config.optimiser,
            run.accelerator,
            steps=config.training.steps,
            ema_decay=config.ema_decay,
        )

    @property
    def learners(self) -> Sequence[Learner]:
        return [self.learner]

    def backward(self, batch: Batch, step: int, share: float) -> dict[str, Tensor]:
        """Draw noise, timesteps and dropout for (seed, step, position) and add the gradient of the mean loss."""
        losses = self._losses(self.learner.wrapped, batch, step, self.config.conditions.text.dropout)
        loss = losses.mean()
        self.run.accelerator.backward(loss * share)
        return {"loss": loss.detach()}

    def _losses(self, step_module: nn.Module, batch: Batch, step: int, text_dropout: float) -> Tensor:
        """Loss of each sample, [B]; all that is random is drawn for (seed, step, position)."""
        latents = self._latents(batch, step)  # [B, C, h, w]
        noise = self._normal(batch, latents.shape[1:], "noise", step)
        uniforms = uniform_for_each(batch.positions, self.run.seed, "timestep", step)
        timesteps = timesteps_from_uniforms(self.config.objective, self.config.noise, uniforms)
        conditions, tokens = self._conditions(batch, step, text_dropout)
        return step_module(latents, noise, self._on_device(timesteps), conditions, tokens)

    @torch.no_grad()
    def _latents(self, batch: Batch, step: int) -> Tensor:
        """A fresh sample of each posterior, from the cache or the autoencoder, scaled for the U-Net."""
        if batch.moments is not None:
            moments = Moments(*batch.moments)
        elif batch.images is not None:
            moments = encode(self.autoencoder, batch.images)
        else:
            raise TypeError("a batch holds images or moments")
        noise = self._normal(batch, moments.mean.shape[1:], "posterior", step)
        return to_unet(self.autoencoder, moments.sample(noise))

    def _conditions(self, batch: Batch, step: int, text_dropout: float) -> tuple[Conditions, Tensor | None]:
        """Text with dropout: a dropped caption is the empty one, as at generation without a prompt."""
        if self.text_encoder is None:
            return Conditions(), None
        uniforms = uniform_for_each(batch.positions, self.run.seed, "dropout/text", step)
        drop = dropped(text_dropout, uniforms).tolist()  # on the CPU: no host sync
        captions = ["" if lost else caption for caption, lost in zip(batch.captions, drop, strict=True)]
        tokens = self._on_device(self.text_encoder.tokenize(captions))  # [B, L]
        if self._trains_text:
            return Conditions(), tokens
        with torch.no_grad(), self.run.accelerator.autocast():
            return Conditions(context=self.text_encoder(tokens)), None

    @torch.no_grad()
    def validate(self, step: int) -> Validation:
        """The loss on fixed images, noise and timesteps, and a grid of pictures, with the averaged weights."""
        preview = self.config.preview
        numbers = {}
        with self.learner.averaged_weights():
            if preview.loss_images:
                numbers["loss"] = self._validation_loss()
            pipeline = self.pipeline()
            prompts = list(preview.prompts) or [""] * preview.count
            if not preview.prompts and self.text_encoder is not None:
                prompts = list(distinct_captions(self._validation_source, preview.count))
            with self.run.accelerator.autocast():
                images = pipeline(
                    prompts,
                    num_inference_steps=preview.num_inference_steps,
                    guidance_scale=preview.guidance_scale,
                    scheduler=preview.scheduler if self.config.noise.prediction != "flow" else "euler",
                    seed=self.run.seed,
                ).images
        return Validation(numbers, grid(list(images), captions=prompts))

    def pipeline(self) -> LatentDiffusionPipeline:
        """The model as it is now, around the very networks that are being trained."""
        scheduler = make_scheduler("euler" if self.config.noise.prediction == "flow" else "ddim", self.config.noise)
        return LatentDiffusionPipeline(self.autoencoder, self.text_encoder, self.unet, scheduler, name=self.config.out)

    def _validation_loss(self) -> float:
        """Mean over `loss_images` images, each at its own fixed timestep; no caption is dropped."""
        data = self.config.validation_data or self.config.data
        samples = list(fixed_samples(self._validation_source, data, self.config.preview.loss_images))
        losses = []
        for first in range(0, len(samples), VALIDATION_BATCH):
            part = samples[first : first + VALIDATION_BATCH]
            batch = Batch(
                keys=tuple(sample.key for sample, _ in part),
                positions=tuple(range(first, first + len(part))),
                captions=tuple(sample.captions[0] for sample, _ in part),
                images=torch.stack([image for _, image in part]),
            ).to(self.run.accelerator.device)
            losses.append(self._losses(self.learner.module, batch, VALIDATION_STEP, text_dropout=0.0))
        return torch.cat(losses).mean().item()

    def _normal(self, batch: Batch, shape: Sequence[int], name: str, step: int) -> Tensor:
        return self._on_device(normal_for_each(batch.positions, shape, self.run.seed, name, step))

    def _on_device(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.run.accelerator.device, non_blocking=True)

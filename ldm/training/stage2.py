"""Stage 2: one step of the latent U-Net, and how it is watched while it trains."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from diffusers import UNet2DConditionModel
from PIL.Image import Image
from torch import Tensor, nn

from autoencoder.latents import Moments, encode, to_unet
from autoencoder.model import Autoencoder
from conditioning.encoders import ConditionEncoders, ConditionInputs
from ldm.data.fixed_batches import fixed_batches
from ldm.data.sample import Batch, Source
from ldm.noise import NoiseConfig, NoiseSchedule, add_noise, training_target
from ldm.objective import ObjectiveConfig, diffusion_loss, loss_weights, timesteps_from_uniforms
from ldm.pipeline import LatentDiffusionPipeline
from ldm.pipeline_model import NotFinitePicture
from ldm.randomness import normal_for_each, uniform_for_each
from ldm.sampling import make_scheduler
from ldm.training.conditions import condition_inputs, draw_losing, wanted_of
from ldm.training.learner import Learner
from ldm.training.loop import Validation
from ldm.training.preview import draw_preview
from ldm.training.prior import Artist
from ldm.training.run import Run
from ldm.training.stage2_config import Stage2Config
from ldm.unet import denoise

VALIDATION_STEP = -1
"""The step number of validation's random draws: training counts from 0."""
VALIDATION_BATCH = 16


class DiffusionStep(nn.Module):
    """The whole loss in one forward, so that data parallelism sees the gradients of U-Net and encoders alike."""

    def __init__(
        self,
        unet: UNet2DConditionModel,
        encoders: ConditionEncoders,
        noise: NoiseConfig,
        objective: ObjectiveConfig,
        schedule: NoiseSchedule,
    ) -> None:
        super().__init__()
        self.unet = unet
        self.encoders = encoders
        self._noise_config, self._objective = noise, objective
        self._schedule = schedule

    def forward(self, latents: Tensor, noise: Tensor, timesteps: Tensor, inputs: ConditionInputs) -> Tensor:
        """Loss of each sample, [B].

        latents, noise: [B, C, h, w], latents as the U-Net sees them; timesteps [B].
        """
        conditions = self.encoders(inputs, *latents.shape[-2:])
        levels = self._schedule.levels(timesteps)
        noisy_latents = add_noise(latents, noise, levels)  # [B, C, h, w]
        output = denoise(self.unet, noisy_latents, timesteps, conditions)  # [B, C, h, w]
        target = training_target(self._noise_config.prediction, latents, noise, levels)
        weights = loss_weights(self._objective, self._noise_config, levels.snr)  # [B]
        return diffusion_loss(output, target, weights, self._objective.loss)


class DiffusionStage:
    """What the loop calls: a batch to latents, noise and conditions, then the step; and previews."""

    script = "train_ldm.py"

    def __init__(
        self,
        config: Stage2Config,
        run: Run,
        autoencoder: Autoencoder,
        encoders: ConditionEncoders,
        unet: UNet2DConditionModel,
        noise: NoiseConfig,
        validation_source: Source,
    ) -> None:
        self.config, self.run, self.noise = config, run, noise
        self.autoencoder, self.encoders, self.unet = autoencoder, encoders, unet
        self._validation_source = validation_source
        if config.runtime.channels_last:
            unet.to(memory_format=torch.channels_last)
            autoencoder.to(memory_format=torch.channels_last)
        autoencoder.requires_grad_(False).eval().to(run.accelerator.device)
        if config.compile:
            unet.compile()
        make_scheduler(config.preview.scheduler_for(noise), noise)  # what cannot draw is told now, not after hours
        schedule = NoiseSchedule.from_config(noise).to(run.accelerator.device)
        self.learner = Learner(
            "unet",
            DiffusionStep(unet, encoders, noise, config.objective, schedule),
            config.optimiser,
            run.accelerator,
            steps=config.training.steps,
            ema_decay=config.ema_decay,
        )

    @property
    def learners(self) -> Sequence[Learner]:
        return [self.learner]

    def backward(self, batch: Batch, step: int, share: float) -> dict[str, Tensor]:
        """Draw noise, timesteps and dropout for (seed, step, position) and add the gradient of the mean loss.

        The mean is that of w_i loss_i over the samples of the global batch, of which there are as many in every
        micro-batch of every process; it is not divided by the sum of the weights w_i (DreamBooth's equation 2).
        """
        losing = draw_losing(self.config.conditions.dropouts(), batch, self.run.seed, step)
        losses = self._losses(self.learner.wrapped, batch, step, losing)  # [B]
        loss = (losses if batch.weights is None else losses * batch.weights).mean()
        self.run.accelerator.backward(loss * share)
        return {"loss": loss.detach()}

    def _losses(self, step_module: nn.Module, batch: Batch, step: int, losing: dict[str, Tensor]) -> Tensor:
        """Loss of each sample, [B]; all that is random is drawn for (seed, step, position)."""
        latents = self._latents(batch, step)  # [B, C, h, w]
        noise = self._normal(batch, latents.shape[1:], "noise", step)
        uniforms = uniform_for_each(batch.positions, self.run.seed, "timestep", step)
        timesteps = timesteps_from_uniforms(self.config.objective, self.noise, uniforms)
        with torch.no_grad():
            inputs = condition_inputs(self.encoders, batch, self._encode, losing)
        tokens = None if inputs.tokens is None else self._on_device(inputs.tokens)
        return step_module(latents, noise, self._on_device(timesteps), replace(inputs, tokens=tokens))

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

    def _encode(self, images: Tensor) -> Tensor:
        return to_unet(self.autoencoder, encode(self.autoencoder, images).mean)

    @torch.no_grad()
    def validate(self, step: int) -> Validation:
        """The loss on fixed images, noise and timesteps, and a grid of pictures, with the averaged weights."""
        numbers = {}
        with self.learner.averaged_weights():
            if self.config.preview.loss_images:
                numbers["loss"] = self._validation_loss()
            return Validation(numbers, self._preview(step))

    def _preview(self, step: int) -> Image | None:
        """None if the model as it is now draws what is not finite: a run does not end because of that."""
        try:
            with self.run.accelerator.autocast():
                return draw_preview(self.pipeline(), self.config.preview, self._preview_samples(), self.run.seed)
        except NotFinitePicture as error:
            self.run.say(f"step {step}: no preview, the training goes on: {error}")
            return None

    def _preview_samples(self) -> Batch:
        """What to draw: the given prompts alone, or the captions, maps and masks of validation samples."""
        preview = self.config.preview
        if preview.prompts:
            prompts = preview.prompts
            return Batch(prompts, tuple(range(len(prompts))), prompts)
        return next(iter(self._validation_batches(preview.count, preview.count, squares=True)))

    def pipeline(self) -> LatentDiffusionPipeline:
        """The model as it is now, around the very networks that are being trained."""
        scheduler = make_scheduler("euler" if self.noise.prediction == "flow" else "ddim", self.noise)
        return LatentDiffusionPipeline(
            self.autoencoder,
            self.encoders.text,
            self.unet,
            scheduler,
            semantic_encoder=self.encoders.semantic,
            label_encoder=self.encoders.label,
            name=self.config.out,
        )

    def artist(self, weights: str) -> Artist:
        """What draws class images; call it before training. `weights` is a hash of those of the model."""
        scheduler = self.config.preview.scheduler_for(self.noise)
        return Artist(self.pipeline, str(self.config.model), weights, scheduler, self.config.data.resolution)

    def _validation_batches(self, count: int, batch_size: int, *, squares: bool = False) -> Iterator[Batch]:
        data = self.config.validation_data or self.config.data
        if squares:  # pictures that stand side by side are of one size
            data = replace(data, buckets=None)
        wanted = wanted_of(self.config.conditions, self.encoders)
        names = self.encoders.label.classes if self.encoders.label is not None else ()
        classes = self.encoders.semantic.classes if self.encoders.semantic is not None else ()
        source = self._validation_source
        batches = fixed_batches(source, data, count, batch_size, wanted, self.run.seed, names, classes)
        return (batch.to(self.run.accelerator.device) for batch in batches)

    def _validation_loss(self) -> float:
        """Mean over `loss_images` images, each at its own fixed timestep; no condition is dropped."""
        losses = []
        for batch in self._validation_batches(self.config.preview.loss_images, VALIDATION_BATCH):
            losing = {name: torch.zeros(len(batch), dtype=torch.bool) for name in self.config.conditions.dropouts()}
            losses.append(self._losses(self.learner.module, batch, VALIDATION_STEP, losing))
        return torch.cat(losses).mean().item()

    def _normal(self, batch: Batch, shape: Sequence[int], name: str, step: int) -> Tensor:
        return self._on_device(normal_for_each(batch.positions, shape, self.run.seed, name, step))

    def _on_device(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.run.accelerator.device, non_blocking=True)

"""A run of stage 1 on made-up images: what `AutoencoderStage` does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from autoencoder.discriminator import PatchDiscriminator
from autoencoder.latents import decode, encode
from autoencoder.losses import ReconstructionLoss, random_lpips
from autoencoder.model import Autoencoder, build_autoencoder, downsampling_factor, freeze_encoder, latent_channels
from ldm.errors import user_input
from ldm.training.plan_networks import Sketch
from ldm.training.plan_steps import Phase, Place, Update
from ldm.training.stage1 import AdversaryStep, AutoencoderStep, Stage1Config

FIXED_BATCH = 16
"""Images that `ldm.data.fixed_batches.fixed_images` gives at once."""


@dataclass(frozen=True)
class AutoencoderMaker:
    """Makes `AutoencoderBench`. The adversary is there from the beginning if it ever comes."""

    config: Stage1Config
    sketch: Sketch
    micro_batch: int

    def networks(self) -> tuple[AutoencoderStep, AdversaryStep | None]:
        """The modules of both steps."""
        config, adversary = self.config, None
        discriminator = None
        if config.discriminator.active(config.training.steps - 1):
            discriminator = PatchDiscriminator(config.discriminator)
            adversary = AdversaryStep(discriminator, config.discriminator)
        return _step(_autoencoder(config, self.sketch), config, discriminator), adversary

    def bench(self, networks: tuple[AutoencoderStep, AdversaryStep | None], place: Place) -> AutoencoderBench:
        """A run of them."""
        return AutoencoderBench(self.config, *networks, place, self.micro_batch)


class AutoencoderBench:
    """What `AutoencoderStage` does."""

    cached_image: int = 0

    def __init__(
        self,
        config: Stage1Config,
        step: AutoencoderStep,
        adversary: AdversaryStep | None,
        place: Place,
        micro_batch: int,
    ) -> None:
        self._config, self._step, self._adversary = config, step, adversary
        self._place, self._size, self._autoencoder = place, micro_batch, step.autoencoder
        lpips = step.reconstruction_loss.lpips
        networks = {"autoencoder": step, "discriminator": adversary, "LPIPS": lpips}
        self.parts: Mapping[str, nn.Module] = {name: part for name, part in networks.items() if part is not None}
        for part in self.parts.values():
            part.to(place.device)
            if config.runtime.channels_last:
                part.to(memory_format=torch.channels_last)
        self.updates: Sequence[Update] = [Update(step, config.optimiser, config.ema_decay, place)]
        if adversary is not None:
            self.updates = [*self.updates, Update(adversary, config.discriminator_optimiser, 0.0, place)]

    def micro_batch(self) -> None:
        """As `AutoencoderStage.backward`."""
        images, place = self._images(self._size), self._place
        side = images.shape[-1] // downsampling_factor(self._autoencoder)
        noise = torch.randn(self._size, latent_channels(self._autoencoder), side, side, device=place.device)
        with place.autocast():
            loss, _, targets, reconstructions = self._step(images, noise, 1.0, self._adversary is not None)
        loss.backward()
        if self._adversary is not None:
            with place.autocast():
                loss, _ = self._adversary(targets, reconstructions.detach())
            loss.backward()

    def phases(self) -> dict[str, Phase]:
        """Validation; the report at the end is like it."""
        training, images = self._config.training, self._config.validation_images
        size = min(FIXED_BATCH, images)
        times = (training.steps / training.validate_every * images + self._config.report_images) / size
        return {"validation": Phase(lambda: self._validate(size), lambda _: times, "validation_images", size)}

    @torch.no_grad()
    def _validate(self, size: int) -> None:
        decode(self._autoencoder, encode(self._autoencoder, self._images(size)).mean)

    def _images(self, size: int) -> Tensor:
        side = self._config.data.resolution
        images = torch.randn(size, 3, side, side, device=self._place.device)
        return images.contiguous(memory_format=torch.channels_last) if self._config.runtime.channels_last else images


def _autoencoder(config: Stage1Config, sketch: Sketch) -> Autoencoder:
    with user_input("autoencoder"):
        if config.autoencoder.pretrained is None:
            autoencoder = build_autoencoder(config.autoencoder)
        else:
            autoencoder = sketch.autoencoder_at(config.autoencoder.pretrained)
            if config.autoencoder.gradient_checkpointing:
                autoencoder.enable_gradient_checkpointing()
    if config.train == "decoder":
        freeze_encoder(autoencoder)
    return autoencoder


def _step(autoencoder: Autoencoder, config: Stage1Config, discriminator: PatchDiscriminator | None) -> AutoencoderStep:
    """The step, with random weights in LPIPS, so that its file need not be here."""
    if config.loss.perceptual != "lpips":
        return AutoencoderStep(autoencoder, config, discriminator)
    without = replace(config, loss=replace(config.loss, perceptual="none"))
    step = AutoencoderStep(autoencoder, without, discriminator)
    with torch.device("cpu"):  # it reads a file of torchmetrics'
        step.reconstruction_loss = ReconstructionLoss(config.loss, random_lpips(config.loss))
    return step

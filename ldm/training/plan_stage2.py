"""A run of stage 2 on made-up latents and conditions: what `DiffusionStage` does, the latent cache and class images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from autoencoder.latents import decode, encode, from_unet, to_unet
from autoencoder.model import downsampling_factor, latent_channels
from conditioning.encoders import ConditionInputs
from ldm.data.sample import Source
from ldm.noise import NoiseSchedule
from ldm.objective import timesteps_from_uniforms
from ldm.training.networks import Networks
from ldm.training.plan_networks import Sketch
from ldm.training.plan_steps import Phase, Place, Update
from ldm.training.stage2 import VALIDATION_BATCH, DiffusionStep
from ldm.training.stage2_config import Stage2Config
from ldm.unet import denoise


@dataclass(frozen=True)
class DiffusionMaker:
    """Makes `DiffusionBench`; see there."""

    config: Stage2Config
    source: Source
    sketch: Sketch
    micro_batch: int

    def networks(self) -> Networks:
        """All of them, of the right sizes."""
        return self.sketch.networks(self.config, self.source)

    def bench(self, networks: Networks, place: Place) -> DiffusionBench:
        """A run of them."""
        return DiffusionBench(self.config, networks, place, self.micro_batch)


class DiffusionBench:
    """The U-Net, its encoders, and the autoencoder beside them."""

    def __init__(self, config: Stage2Config, networks: Networks, place: Place, micro_batch: int) -> None:
        self._config, self._networks, self._place, self._size = config, networks, place, micro_batch
        autoencoder, unet, encoders = networks.autoencoder, networks.unet, networks.encoders
        autoencoder.requires_grad_(False).eval()
        if config.runtime.channels_last:
            unet.to(memory_format=torch.channels_last)
            autoencoder.to(memory_format=torch.channels_last)
        schedule = NoiseSchedule.from_config(networks.noise).to(place.device)
        self._step = DiffusionStep(unet, encoders, networks.noise, config.objective, schedule).train()
        self.updates: Sequence[Update] = [Update(self._step, config.optimiser, config.ema_decay, place)]
        found = {
            "U-Net": unet,
            "text encoder": encoders.text,
            "semantic encoder": encoders.semantic,
            "label encoder": encoders.label,
            "autoencoder": autoencoder,
        }
        self.parts: Mapping[str, nn.Module] = {name: part for name, part in found.items() if part is not None}
        self._channels = latent_channels(autoencoder)
        self._side = config.data.resolution // downsampling_factor(autoencoder)
        numbers = 2 * self._channels * self._side**2 * (1 + config.data.flip)  # mean and log-variance, both ways round
        self.cached_image = torch.float16.itemsize * numbers if config.cache.enabled else 0

    def micro_batch(self) -> None:
        """As `DiffusionStage.backward`."""
        self._losses(self._size, cached=self._config.cache.enabled).mean().backward()

    def phases(self) -> dict[str, Phase]:
        """Building the cache, class images, validation loss and previews, where the config has them."""
        phases = {}
        cache, prior = self._config.cache, self._config.prior
        if cache.enabled:
            views, size = 1 + self._config.data.flip, cache.batch_size
            phases["latent cache"] = Phase(
                lambda: self._encoded(size), lambda images: views * images / size, "cache.batch_size", size, before=True
            )
        if prior is not None:
            calls = prior.count / prior.batch_size
            steps = prior.num_inference_steps
            phases |= self._drawing("class images", prior.batch_size, calls, steps, "prior.batch_size", before=True)
        return phases | self._watching()

    def _watching(self) -> dict[str, Phase]:
        training, preview = self._config.training, self._config.preview
        conditions = self._config.conditions
        often = -(-training.steps // training.validate_every) + training.validate_first
        phases = {}
        if preview.loss_images:
            size = min(VALIDATION_BATCH, preview.loss_images)
            calls = often * preview.loss_images / size
            phases["validation loss"] = Phase(
                lambda: self._validate(size), lambda _: calls, "preview.loss_images", size
            )
        if self._config.watch is not None:
            watch = self._config.watch
            size = min(watch.batch_size, watch.count)
            calls = training.steps // watch.every * watch.count / size
            phases |= self._drawing("watch", size, calls, watch.num_inference_steps, "watch.batch_size")
        rows = 1 + (conditions.semantic is not None) + (conditions.inpainting is not None)
        size, key = (len(preview.prompts), None) if preview.prompts else (preview.count, "preview.count")
        return phases | self._drawing("previews", size, often * rows, preview.num_inference_steps, key)

    def _drawing(
        self, name: str, size: int, calls: float, steps: int, key: str | None, *, before: bool = False
    ) -> dict[str, Phase]:
        """Drawing `size` pictures at once, `calls` times in all."""
        return {
            f"{name}: U-Net": Phase(lambda: self._predict(size), lambda _: calls * steps, key, size, before),
            f"{name}: decoding": Phase(lambda: self._decode(size), lambda _: calls, key, size, before),
        }

    def _losses(self, size: int, *, cached: bool) -> Tensor:
        """Loss of each of `size` samples, [B]."""
        latents = self._normal(size) if cached else self._encoded(size)
        uniforms = torch.rand(size, device=self._place.device)
        timesteps = timesteps_from_uniforms(self._config.objective, self._networks.noise, uniforms)
        inputs = self._inputs(size)
        with self._place.autocast():
            return self._step(latents, self._normal(size), timesteps, inputs)

    @torch.no_grad()
    def _validate(self, size: int) -> None:
        self._losses(size, cached=False)

    @torch.no_grad()
    def _predict(self, size: int) -> None:
        """One evaluation of the network under guidance."""
        guided = [name for name in self._config.conditions.dropouts() if name != "inpainting"]
        rows = size * (1 + len(guided))
        timesteps = torch.zeros(rows, dtype=torch.long, device=self._place.device)
        with self._place.autocast():
            told = self._networks.encoders(self._inputs(rows), self._side, self._side)
            denoise(self._networks.unet, self._normal(rows), timesteps, told)

    @torch.no_grad()
    def _decode(self, size: int) -> None:
        with self._place.autocast():
            decode(self._networks.autoencoder, from_unet(self._networks.autoencoder, self._normal(size)))

    @torch.no_grad()
    def _encoded(self, size: int) -> Tensor:
        autoencoder, side = self._networks.autoencoder, self._config.data.resolution
        images = torch.randn(size, 3, side, side, device=self._place.device)
        return to_unet(autoencoder, encode(autoencoder, images).mean)  # [B, C, h, w]

    def _inputs(self, size: int) -> ConditionInputs:
        encoders, device, side = self._networks.encoders, self._place.device, self._config.data.resolution
        tokens = semantic = labels = mask = masked = None
        if encoders.text is not None:
            tokens = torch.zeros(size, encoders.text.length, dtype=torch.long, device=device)
        if encoders.semantic is not None:
            semantic = torch.zeros(size, side, side, dtype=torch.long, device=device)
        if encoders.label is not None:
            labels = torch.zeros(size, dtype=torch.long, device=device)
        if self._config.conditions.inpainting is not None:
            masked = self._encoded(size)
            mask = torch.ones_like(masked[:, :1])
        return ConditionInputs(tokens, mask, masked, semantic, labels)

    def _normal(self, size: int) -> Tensor:
        return torch.randn(size, self._channels, self._side, self._side, device=self._place.device)

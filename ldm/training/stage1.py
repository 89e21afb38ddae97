"""Stage 1: one step of the autoencoder and its adversary, and how the result is measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar, Literal

import torch
import torch.distributed
from torch import Tensor, nn

from autoencoder.discriminator import (
    DiscriminatorConfig,
    PatchDiscriminator,
    adaptive_weight,
    discriminator_loss,
    frozen,
    generator_loss,
)
from autoencoder.latents import decode, encode, quantise, scale_equivariance
from autoencoder.losses import AutoencoderLossConfig, ReconstructionLoss, kl_loss, lpips_distance
from autoencoder.model import (
    Autoencoder,
    AutoencoderConfig,
    downsampling_factor,
    freeze_encoder,
    last_decoder_layer,
    latent_channels,
)
from ldm.data.fixed_batches import fixed_images
from ldm.data.sample import Batch, Source
from ldm.data.sources import DataConfig
from ldm.evaluation.reconstruction import measure_reconstructions
from ldm.randomness import normal_for_each, uniform_for_each
from ldm.training.learner import Learner, OptimiserConfig
from ldm.training.loop import FREE_TO_CHANGE, TrainingConfig, Validation
from ldm.training.run import Run, RuntimeConfig

LatentScale = Literal["channel", "overall"]


@dataclass(frozen=True, kw_only=True)
class Stage1Config:
    """Everything that `train_vae.py` reads."""

    out: str
    data: DataConfig
    training: TrainingConfig
    seed: int = 0
    validation_data: DataConfig | None = None  # null: measured on training images, and the report says so
    validation_images: int = 64  # while training
    report_images: int = 512  # at the end
    statistics_images: int = 2048  # training images whose latent mean and deviation are folded into the weights
    latent_scale: LatentScale = "channel"  # overall: one factor for all channels, the usual way, to compare with
    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    train: Literal["all", "decoder"] = "all"  # decoder: the latents stay as they are, so a U-Net trained on them fits
    loss: AutoencoderLossConfig = field(default_factory=AutoencoderLossConfig)
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)
    optimiser: OptimiserConfig = field(default_factory=OptimiserConfig)
    discriminator_optimiser: OptimiserConfig = field(default_factory=OptimiserConfig)
    ema_decay: float = 0.999  # of the autoencoder only; 0 = none
    keep_best: Literal["psnr", "ssim", "lpips"] | None = None  # keep the checkpoint that validates best, as RUN/best
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)

    free_to_change: ClassVar[tuple[str, ...]] = (
        *FREE_TO_CHANGE,
        "validation_",
        "report_images",
        "statistics_images",
        "latent_scale",
        "keep_best",
    )

    def __post_init__(self) -> None:
        if self.train == "decoder" and self.autoencoder.pretrained is None:
            raise ValueError("train: found decoder, but autoencoder.pretrained is null; name the autoencoder to tune")
        if self.keep_best == "lpips" and self.loss.perceptual != "lpips":
            raise ValueError(
                f"keep_best: found lpips with loss.perceptual {self.loss.perceptual}; allowed is psnr or ssim, or "
                "lpips where the loss has its weights; change one of the two"
            )
        if self.loss.perceptual == "features" and self.discriminator.weight == 0:
            raise ValueError(
                "loss.perceptual: found features, which are the discriminator's, but discriminator.weight is 0; "
                "set discriminator.weight above 0, or loss.perceptual to lpips or none"
            )
        smallest = 3 * 2**self.discriminator.layers
        shrunk = self.data.resolution * (self.loss.equivariance_minimum if self.loss.equivariance else 1)
        if self.discriminator.weight and shrunk < smallest:
            raise ValueError(
                f"discriminator.layers: found {self.discriminator.layers}, which needs {smallest} px, but images come "
                f"down to {shrunk:g} px; lower it, or raise data.resolution or loss.equivariance_minimum"
            )
        for name, data in (("data", self.data), ("validation_data", self.validation_data)):
            if data is not None and data.buckets is not None:
                raise ValueError(
                    f"{name}.buckets: found in stage 1, which trains on squares; allowed is null; leave it out"
                )
        weights = [folder.weight for folder in self.data.folders or () if folder.weight != 1]
        if weights:
            raise ValueError(
                f"data.folders: found weight {weights[0]} in stage 1, whose losses have none; allowed is 1; "
                "use repeats instead"
            )
        for name in ("validation_images", "report_images", "statistics_images"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: found {getattr(self, name)}; allowed is 1 or more")


class AutoencoderStep(nn.Module):
    """The generator's whole loss in one forward, so that data parallelism sees every gradient.

    The discriminator is held without being registered, since it has an optimiser of its own.
    """

    def __init__(
        self, autoencoder: Autoencoder, config: Stage1Config, discriminator: PatchDiscriminator | None
    ) -> None:
        super().__init__()
        self.autoencoder = autoencoder
        self.reconstruction_loss = ReconstructionLoss(config.loss)
        self._config = config
        self._unregistered = (discriminator,)

    def forward(
        self, images: Tensor, noise: Tensor, scale: float, adversarial: bool
    ) -> tuple[Tensor, dict[str, Tensor], Tensor, Tensor]:
        """images [B, 3, H, W] in [-1, 1]; noise [B, C, h, w]; `scale` < 1 shrinks latents and images before decoding.

        Returns the loss, its terms (detached scalars), and targets and reconstructions [B, 3, H * scale, W * scale].
        """
        latents, regularisation, regularisation_name = self._encode(images, noise)  # [B, C, h, w]
        pair = scale_equivariance(latents, images, scale)  # scale 1 gives both back
        reconstructions = decode(self.autoencoder, pair.latents, quantised=scale == 1)  # [B, 3, H, W]
        discriminator = self._unregistered[0] if adversarial else None
        with nullcontext() if discriminator is None else frozen(discriminator):
            features = None
            if discriminator is not None:
                judged = discriminator.judge(reconstructions)
                if self._config.loss.perceptual == "features":
                    features = (discriminator.features(pair.images), judged.features)
            terms = self.reconstruction_loss(pair.images, reconstructions, features)
            loss = terms.total + regularisation
            values = {**terms._asdict(), regularisation_name: regularisation}
            del values["total"]
            if discriminator is not None:
                adversarial_loss = generator_loss(self._config.discriminator.loss, judged.logits)
                weight = self._adversarial_weight(terms.total, adversarial_loss)
                loss = loss + weight * adversarial_loss
                values |= {"adversarial": adversarial_loss, "adversarial_weight": weight}
        values = {"loss": loss, **values}
        return loss, {name: value.detach() for name, value in values.items()}, pair.images, reconstructions

    def _encode(self, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, str]:
        """Latents as the decoder gets them, and the weighted regularisation of the latents with its name."""
        moments = encode(self.autoencoder, images)
        if self._config.autoencoder.kind == "vq":
            codes = quantise(self.autoencoder, moments.mean)
            return codes.latents, self._config.loss.codebook_weight * codes.codebook_loss, "codebook"
        return moments.sample(noise), self._config.loss.kl_weight * kl_loss(moments), "kl"

    def _adversarial_weight(self, reconstruction: Tensor, adversarial: Tensor) -> Tensor:
        """`discriminator.weight`, times the adaptive weight from the gradients of the whole global batch."""
        weight = reconstruction.new_tensor(self._config.discriminator.weight)
        layer = last_decoder_layer(self.autoencoder)
        if not (self._config.discriminator.adaptive and self.training):
            return weight
        reconstruction_gradient, adversarial_gradient = (
            _mean_over_processes(torch.autograd.grad(loss, layer, retain_graph=True)[0])
            for loss in (reconstruction, adversarial)
        )
        return weight * adaptive_weight(reconstruction_gradient, adversarial_gradient)


class AdversaryStep(nn.Module):
    """The discriminator's whole loss in one forward."""

    def __init__(self, discriminator: PatchDiscriminator, config: DiscriminatorConfig) -> None:
        super().__init__()
        self.discriminator = discriminator
        self._config = config

    def forward(self, images: Tensor, reconstructions: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Both [B, 3, H, W], detached. Returns the loss and what it thinks of real and reconstructed patches."""
        # One pass over both: with two, data parallelism would see two forwards before one backward.
        real, fake = self.discriminator(torch.cat([images, reconstructions])).float().chunk(2)  # [B, 1, h, w] each
        loss = discriminator_loss(self._config.loss, real, fake)
        values = {"discriminator": loss, "logits_real": real.mean(), "logits_fake": fake.mean()}
        return loss, {name: value.detach() for name, value in values.items()}


class AutoencoderStage:
    """What the loop calls: backward through both networks, and validation."""

    script = "train_vae.py"

    def __init__(
        self,
        config: Stage1Config,
        run: Run,
        autoencoder: Autoencoder,
        validation_source: Source,
    ) -> None:
        self.config, self.run = config, run
        self.autoencoder = autoencoder
        self._validation_source = validation_source
        discriminator = PatchDiscriminator(config.discriminator) if config.discriminator.weight > 0 else None
        if config.train == "decoder":
            freeze_encoder(autoencoder)
        self._step = AutoencoderStep(autoencoder, config, discriminator)
        self.generator = self._learner("autoencoder", self._step, config.optimiser, config.ema_decay)
        self.adversary: Learner | None = None
        if discriminator is not None:
            module = AdversaryStep(discriminator, config.discriminator)
            self.adversary = self._learner("discriminator", module, config.discriminator_optimiser, ema_decay=0.0)

    @property
    def learners(self) -> Sequence[Learner]:
        return [self.generator] if self.adversary is None else [self.generator, self.adversary]

    @property
    def lpips(self) -> Callable[[Tensor, Tensor], Tensor] | None:
        """LPIPS of each pair, where the loss has its weights loaded."""
        network = self._step.reconstruction_loss.lpips
        return None if network is None else partial(lpips_distance, network)

    def backward(self, batch: Batch, step: int, share: float) -> dict[str, Tensor]:
        """Gradients of one micro-batch for both networks, from one set of reconstructions."""
        if batch.images is None:
            raise TypeError("stage 1 trains on images, not on cached latents")
        images = batch.images  # [B, 3, H, W]
        if self.config.runtime.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        adversarial = self.config.discriminator.active(step)
        noise = self._noise(batch.positions, images.shape[-2:], step)
        loss, values, targets, reconstructions = self.generator.wrapped(images, noise, self._scale(step), adversarial)
        self.run.accelerator.backward(loss * share)
        if adversarial and self.adversary is not None:
            adversary_loss, judged = self.adversary.wrapped(targets, reconstructions.detach())
            self.run.accelerator.backward(adversary_loss * share)
            values |= judged
        return values

    @torch.no_grad()
    def validate(self, step: int) -> Validation:
        """PSNR and SSIM on fixed images with the averaged weights, and originals beside reconstructions."""
        config = self.config.validation_data or self.config.data
        images = fixed_images(self._validation_source, config, self.config.validation_images)
        with self.generator.averaged_weights(), evaluating(self.autoencoder):
            report, picture = measure_reconstructions(self.autoencoder, images, self.lpips)
        return Validation(report.numbers(), picture)

    def _learner(self, name: str, module: nn.Module, config: OptimiserConfig, ema_decay: float) -> Learner:
        if self.config.runtime.channels_last:
            module.to(memory_format=torch.channels_last)
        steps = self.config.training.steps
        return Learner(name, module, config, self.run.accelerator, steps=steps, ema_decay=ema_decay)

    def _noise(self, positions: Sequence[int], size: Sequence[int], step: int) -> Tensor:
        """Posterior noise [B, C, h, w] for images of `size` (H, W), of (seed, step, position)."""
        factor = downsampling_factor(self.autoencoder)
        shape = (latent_channels(self.autoencoder), *(side // factor for side in size))
        noise = normal_for_each(positions, shape, self.run.seed, "posterior", step)
        return noise.to(self.run.accelerator.device, non_blocking=True)

    def _scale(self, step: int) -> float:
        """1, or in a share of the steps the factor of scale equivariance; the same for the whole global batch."""
        loss = self.config.loss
        chosen, factor = (uniform_for_each([0], self.run.seed, name, step).item() for name in ("scaled?", "scale"))
        if chosen >= loss.equivariance:
            return 1.0
        return loss.equivariance_minimum + (1 - loss.equivariance_minimum) * factor


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode inside, the mode of before afterwards."""
    was_training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(was_training)


def _mean_over_processes(gradient: Tensor) -> Tensor:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        gradient = gradient.contiguous()
        torch.distributed.all_reduce(gradient)
        gradient = gradient / torch.distributed.get_world_size()
    return gradient

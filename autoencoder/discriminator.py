"""PatchGAN discriminator and the adversarial losses of stage 1."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import gcd
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

AdversarialLoss = Literal["hinge", "vanilla"]
GREATEST_ADAPTIVE_WEIGHT = 1e4
"""Latent diffusion's ceiling of the adaptive weight."""


@dataclass(frozen=True, kw_only=True)
class DiscriminatorConfig:
    """The adversary of stage 1."""

    layers: int = 3
    """Halvings of the image. A logit sees 70 x 70 pixels at 3, 34 at 2, 16 at 1; the image needs 3 x 2 ** layers."""
    channels: int = 64
    """Width of the first layer; it doubles per layer, up to eight times."""
    norm: Literal["group", "none"] = "group"
    """No batch norm: its statistics would ignore the other ranks."""
    loss: AdversarialLoss = "hinge"
    weight: float = 0.5
    """Factor on the generator loss, after the adaptive weight. 0: no adversary at all."""
    start_step: int = 50_000
    """The first step with an adversary; before it neither network sees the other."""
    adaptive: bool = True
    """Scale the generator loss by |grad rec| / |grad adv| at the decoder's last layer."""

    def __post_init__(self) -> None:
        if self.layers < 1:
            raise ValueError(f"layers: found {self.layers}; allowed is 1 or more; 3 is usual")
        if self.channels < 1:
            raise ValueError(f"channels: found {self.channels}; allowed is 1 or more; 64 is usual")
        if self.norm not in ("group", "none"):
            raise ValueError(f"norm: found {self.norm!r}; allowed is group or none; choose one")
        if self.loss not in ("hinge", "vanilla"):
            raise ValueError(f"loss: found {self.loss!r}; allowed is hinge or vanilla; choose one")
        if not 0.0 <= self.weight < float("inf"):
            raise ValueError(f"weight: found {self.weight}; allowed is 0 or more; 0 switches the adversary off")
        if self.start_step < 0:
            raise ValueError(f"start_step: found {self.start_step}; allowed is 0 or more; 0 starts at once")

    def active(self, step: int) -> bool:
        """Whether step number `step` (from 0) has an adversary."""
        return self.weight > 0.0 and step >= self.start_step


class Judgement(NamedTuple):
    logits: Tensor  # [B, 1, h', w'], high = real
    features: list[Tensor]  # activations of each hidden layer, for feature matching


class PatchDiscriminator(nn.Module):
    """PatchGAN (pix2pix, arXiv 1611.07004): 4x4 convolutions that call every patch real or fake.

    With `norm` group, the statistics span the image, so a logit also sees the whole image's contrast, as in pix2pix.
    """

    def __init__(self, config: DiscriminatorConfig) -> None:
        super().__init__()
        self.config = config
        widths = [config.channels * min(2**i, 8) for i in range(config.layers + 1)]
        blocks = []
        for i, width in enumerate(widths):
            stride = 2 if i < config.layers else 1
            normed = config.norm == "group" and i > 0
            layers: list[nn.Module] = [
                nn.Conv2d(widths[i - 1] if i else 3, width, 4, stride, padding=1, bias=not normed)
            ]
            if normed:
                layers.append(nn.GroupNorm(gcd(32, width), width))
            blocks.append(nn.Sequential(*layers, nn.LeakyReLU(0.2)))
        self.blocks = nn.ModuleList(blocks)
        self.head = nn.Conv2d(widths[-1], 1, 4, 1, padding=1)
        self.apply(_initialise)

    @property
    def receptive_field(self) -> int:
        """Side in pixels of the patch that one logit sees: 70 at 3 layers."""
        field = 1
        for stride in [1, 1] + [2] * self.config.layers:  # from the logit back to the image
            field = (field - 1) * stride + 4
        return field

    @property
    def minimum_size(self) -> int:
        """Smallest image side that gives a logit."""
        return 3 * 2**self.config.layers

    def judge(self, images: Tensor) -> Judgement:
        """Logits and hidden activations in one pass; images [B, 3, H, W] in [-1, 1]."""
        if min(images.shape[-2:]) < self.minimum_size:
            raise ValueError(
                f"discriminator: found an image of {images.shape[-1]} x {images.shape[-2]} px; allowed is "
                f"{self.minimum_size} px or more at {self.config.layers} layers; lower discriminator.layers"
            )
        features = []
        hidden = images
        for block in self.blocks:
            hidden = block(hidden)
            features.append(hidden)
        return Judgement(self.head(hidden), features)

    def features(self, images: Tensor) -> list[Tensor]:
        """Activations of each hidden layer."""
        return self.judge(images).features

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [-1, 1] -> logits [B, 1, h', w']."""
        return self.judge(images).logits


def _initialise(module: nn.Module) -> None:
    """N(0, 0.02), as pix2pix and latent-diffusion do."""
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.GroupNorm):
        nn.init.normal_(module.weight, 1.0, 0.02)


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Within the block the module's parameters take no gradient; gradients still pass through it to its input.

    The generator's step calls the discriminator inside, so that its loss leaves nothing in the discriminator.
    """
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def discriminator_loss(kind: AdversarialLoss, real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Scalar for the discriminator's step. The caller detaches the fakes.

    hinge:   0.5 E[max(0, 1 - D(x))] + 0.5 E[max(0, 1 + D(x'))]        (arXiv 1705.02894)
    vanilla: 0.5 E[softplus(-D(x))]  + 0.5 E[softplus(D(x'))]          (arXiv 1406.2661)
    """
    if kind == "hinge":
        return 0.5 * (F.relu(1.0 - real_logits).mean() + F.relu(1.0 + fake_logits).mean())
    return 0.5 * (F.softplus(-real_logits).mean() + F.softplus(fake_logits).mean())


def generator_loss(kind: AdversarialLoss, fake_logits: Tensor) -> Tensor:
    """Scalar for the autoencoder's step: -E[D(x')] (hinge) or, not saturating, E[softplus(-D(x'))] (vanilla)."""
    return -fake_logits.mean() if kind == "hinge" else F.softplus(-fake_logits).mean()


def feature_matching(real: Sequence[Tensor], fake: Sequence[Tensor]) -> Tensor:
    """Mean over layers of the mean absolute difference (pix2pixHD, arXiv 1711.11585, eq. 4); no gradient to `real`."""
    differences = [F.l1_loss(f, r.detach()) for r, f in zip(real, fake, strict=True)]
    return torch.stack(differences).mean()


def adaptive_weight(reconstruction_gradient: Tensor, adversarial_gradient: Tensor) -> Tensor:
    """|grad rec| / (|grad adv| + 1e-4), clamped to [0, 1e4], detached (VQGAN, arXiv 2012.09841, eq. 7).

    Both gradients are of the decoder's last layer (`last_decoder_layer`); with several ranks, sum them over the ranks
    first, so that all ranks find the same weight.
    """
    reconstruction = torch.linalg.vector_norm(reconstruction_gradient.detach().float())
    adversarial = torch.linalg.vector_norm(adversarial_gradient.detach().float())
    return (reconstruction / (adversarial + 1e-4)).clamp(0.0, GREATEST_ADAPTIVE_WEIGHT)

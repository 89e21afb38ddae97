"""Losses between images and reconstructions, and on the posterior.

Every term is a MEAN (over images, channels and pixels, or over latent elements): weights do not depend on resolution.
CompVis' latent-diffusion sums per image instead. Its weights translate so: reconstruction and perceptual weights stay;
its KL weight k becomes k * (C h w) / (3 H W), which at f8 with 4 channels makes its 1e-6 our 2.1e-8.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from autoencoder.discriminator import feature_matching
from autoencoder.latents import Moments

LpipsNetwork = Literal["vgg", "alex"]
_TRUNKS = {"vgg": "vgg16", "alex": "alexnet"}


@dataclass(frozen=True, kw_only=True)
class AutoencoderLossConfig:
    """Weights of stage 1's loss terms; each multiplies a mean (see the head of this file)."""

    reconstruction: Literal["l1", "l2"] = "l1"
    reconstruction_weight: float = 1.0
    """On the mean absolute (l1) or squared (l2) error per channel and pixel, images in [-1, 1]."""
    l2_weight: float = 0.0
    """On an additional mean squared error."""
    gradient_weight: float = 0.0
    """On the mean absolute error of the image's horizontal and vertical differences."""
    perceptual: Literal["none", "lpips", "features"] = "none"
    """lpips: distance in VGG or AlexNet; features: feature matching on the discriminator, which needs no download."""
    perceptual_weight: float = 1.0
    """On the mean LPIPS per image, or on the mean absolute feature difference."""
    lpips_network: LpipsNetwork = "vgg"
    lpips_weights: str | None = None
    """File of torchvision's VGG16 or AlexNet weights, or the folder of vgg16*.safetensors or alexnet*.safetensors."""
    lpips_allow_pickle: bool = False
    """Also open torchvision's own .pth files, which are pickles (read with weights_only=True)."""
    lpips_download: bool = False
    """Let torchvision download them (528 MB for VGG16) when no lpips_weights are given."""
    kl_weight: float = 1e-6
    """On the KL divergence in nats per latent element."""
    codebook_weight: float = 1.0
    """On the codebook loss, a mean over latent elements."""
    learned_logvar: bool = False
    """Learn the output log-scale s: rec / exp(s) + s takes the place of rec."""
    equivariance: float = 0.0
    """Share of steps in which latents and images are shrunk together before decoding (EQ-VAE, arXiv 2502.09509)."""
    equivariance_minimum: float = 0.25
    """Smallest factor of that shrinking; factors are uniform between it and 1."""

    def __post_init__(self) -> None:
        _check_choice("reconstruction", self.reconstruction, ("l1", "l2"))
        _check_choice("perceptual", self.perceptual, ("none", "lpips", "features"))
        _check_choice("lpips_network", self.lpips_network, ("vgg", "alex"))
        for name in ("reconstruction", "l2", "gradient", "perceptual", "kl", "codebook"):
            value = getattr(self, f"{name}_weight")
            if not 0.0 <= value < float("inf"):
                raise ValueError(f"{name}_weight: found {value}; allowed is 0 or more; 0 switches the term off")
        if not 0.0 <= self.equivariance <= 1.0:
            raise ValueError(
                f"equivariance: found {self.equivariance}; allowed is 0 to 1; 0.5 is usual, 0 switches it off"
            )
        if not 0.0 < self.equivariance_minimum <= 1.0:
            raise ValueError(
                f"equivariance_minimum: found {self.equivariance_minimum}; allowed is above 0 up to 1; 0.25 is usual"
            )
        if not (self.reconstruction_weight or self.l2_weight):
            raise ValueError(
                "reconstruction_weight: found 0 with l2_weight 0; allowed is one of them above 0; raise one"
            )
        if self.perceptual == "lpips" and self.lpips_weights is None and not self.lpips_download:
            raise ValueError(
                f"lpips_weights: found none; allowed is a local file of torchvision's {_TRUNKS[self.lpips_network]} "
                "weights; give its path, or set lpips_download: true, or perceptual: features or none"
            )


def _check_choice(name: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}: found {value!r}; allowed is {', '.join(allowed)}; choose one")


class ReconstructionTerms(NamedTuple):
    """Scalars. `total` is weighted, with the learned log-scale; the others are unweighted means, 0 when off."""

    total: Tensor
    reconstruction: Tensor
    l2: Tensor
    gradient: Tensor
    perceptual: Tensor


class ReconstructionLoss(nn.Module):
    """Weighted reconstruction terms, with the learned log-scale `logvar` if the config asks for it.

    `parameters()` and `state_dict()` hold `logvar` or nothing: give them to the autoencoder's optimiser and checkpoint.
    LPIPS is frozen and follows `.to(...)`, but is neither trained, saved nor synchronised; `lpips` is one in place of
    that whose weights the config names.
    """

    def __init__(self, config: AutoencoderLossConfig, lpips: nn.Module | None = None) -> None:
        super().__init__()
        self.config = config
        self.logvar = nn.Parameter(torch.zeros(())) if config.learned_logvar else None
        # In a tuple, so that torch does not register it: 60 MB that never change have no place in a checkpoint.
        self._unregistered: tuple[nn.Module, ...] = ()
        if config.perceptual == "lpips":
            self._unregistered = (build_lpips(config) if lpips is None else lpips,)

    @property
    def lpips(self) -> nn.Module | None:
        """The LPIPS network, if the config asks for it."""
        return self._unregistered[0] if self._unregistered else None

    def _apply(self, fn: Any, recurse: bool = True) -> ReconstructionLoss:
        for module in self._unregistered:
            module._apply(fn, recurse)
        return super()._apply(fn, recurse)

    def forward(
        self,
        images: Tensor,
        reconstructions: Tensor,
        features: tuple[Sequence[Tensor], Sequence[Tensor]] | None = None,
    ) -> ReconstructionTerms:
        """Images and reconstructions [B, 3, H, W] in [-1, 1] -> scalar terms.

        Args:
            features: (of the images, of the reconstructions) from `PatchDiscriminator.features`, for perceptual
                `features`; call it within `frozen(discriminator)`. None while there is no adversary yet: the term is 0.

        The learned log-scale follows VQGAN: rec / exp(s) + s, least at s = log(rec).
        """
        config = self.config
        images, reconstructions = images.float(), reconstructions.float()
        pixel_loss = F.l1_loss if config.reconstruction == "l1" else F.mse_loss
        zero = reconstructions.new_zeros(())
        reconstruction = pixel_loss(reconstructions, images)
        l2 = F.mse_loss(reconstructions, images) if config.l2_weight else zero
        gradient = image_gradient_loss(images, reconstructions) if config.gradient_weight else zero
        perceptual = self._perceptual(images, reconstructions, features) if config.perceptual_weight else zero
        total = (
            config.reconstruction_weight * reconstruction
            + config.l2_weight * l2
            + config.gradient_weight * gradient
            + config.perceptual_weight * perceptual
        )
        if self.logvar is not None:
            total = total * torch.exp(-self.logvar) + self.logvar
        return ReconstructionTerms(total, reconstruction, l2, gradient, perceptual)

    def _perceptual(
        self, images: Tensor, reconstructions: Tensor, features: tuple[Sequence[Tensor], Sequence[Tensor]] | None
    ) -> Tensor:
        if self._unregistered:
            return lpips_distance(self._unregistered[0], images, reconstructions).mean()
        if self.config.perceptual == "none" or features is None:
            return reconstructions.new_zeros(())
        return feature_matching(*features)


def image_gradient_loss(images: Tensor, reconstructions: Tensor) -> Tensor:
    """Mean absolute error of the differences of neighbouring pixels, the mean of both directions."""
    error = reconstructions - images  # differences are linear
    return 0.5 * (error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean())


def kl_loss(moments: Moments) -> Tensor:
    """Scalar: KL to the standard normal in nats, mean over batch and latent elements."""
    return moments.kl().mean() / moments.mean[0].numel()


def build_lpips(config: AutoencoderLossConfig) -> nn.Module:
    """torchmetrics' LPIPS network, frozen, in evaluation mode.

    torchmetrics ships the small linear heads. The trunk is torchvision's VGG16 or AlexNet, from `lpips_weights`, or
    downloaded by torchvision if `lpips_download` asks for it.

    Raises:
        ValueError, FileNotFoundError: the weights are missing, are a pickle without the flag, or do not fit.
    """
    from torchmetrics.functional.image.lpips import _NoTrainLpips  # the public class always downloads

    if config.lpips_weights is None:
        if not config.lpips_download:
            raise ValueError("lpips_weights: found none; allowed is a local file; give it or set lpips_download: true")
        return _NoTrainLpips(net=config.lpips_network)
    path = _weights_file(Path(config.lpips_weights), config)
    weights = _read_weights(path, config.lpips_allow_pickle)
    network = random_lpips(config)
    _load_trunk(network.net, path, weights)
    return network


def random_lpips(config: AutoencoderLossConfig) -> Any:
    """The LPIPS network that `config` names, its trunk of random weights: to measure the cost, of no use as a loss."""
    from torchmetrics.functional.image.lpips import _NoTrainLpips

    return _NoTrainLpips(net=config.lpips_network, pnet_rand=True)


def lpips_distance(network: nn.Module, images: Tensor, reconstructions: Tensor) -> Tensor:
    """LPIPS of each pair: [B] (arXiv 1801.03924). Images in [-1, 1]; a reconstruction may exceed it."""
    return network(images, reconstructions).flatten()


def _weights_file(path: Path, config: AutoencoderLossConfig) -> Path:
    if path.is_file():
        return path
    if not path.exists():
        raise FileNotFoundError(
            f"lpips_weights: found no file or folder {path}; give torchvision's weights, as .safetensors"
        )
    stem = _TRUNKS[config.lpips_network]
    endings = ("safetensors", "pth") if config.lpips_allow_pickle else ("safetensors",)
    found = [file for ending in endings for file in sorted(path.glob(f"{stem}*.{ending}"))]
    if not found:
        names = " or ".join(f"{stem}*.{ending}" for ending in endings)
        raise FileNotFoundError(f"lpips_weights: found no {names} in {path}; name the file itself or put it there")
    return found[0]


def _read_weights(path: Path, allow_pickle: bool) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        if not allow_pickle:
            raise ValueError("a pickle; allowed is .safetensors; convert it, or set lpips_allow_pickle: true")
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"lpips_weights: found {path}, {' '.join(str(error).split())}") from error


def _load_trunk(trunk: nn.Module, path: Path, weights: dict[str, Tensor]) -> None:
    """torchmetrics calls layer i `sliceK.i`; torchvision calls it `features.i`."""
    own = trunk.state_dict()
    names = {name: f"features.{name.split('.', 1)[1]}" for name in own}
    for name, theirs in names.items():
        if theirs not in weights or weights[theirs].shape != own[name].shape:
            found = tuple(weights[theirs].shape) if theirs in weights else "nothing"
            raise ValueError(
                f"lpips_weights: found {found} for {theirs} in {path}; allowed is {tuple(own[name].shape)}; "
                "give torchvision's weights of the network that lpips_network names"
            )
    trunk.load_state_dict({name: weights[theirs] for name, theirs in names.items()})

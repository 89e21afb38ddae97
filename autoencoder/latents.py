"""Images <-> latents: posterior moments, the one place of latent scaling, statistics, folding them into the weights.

"Raw" latents are what the encoder gives and the decoder takes. "Scaled" latents are what the U-Net sees.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from diffusers import VQModel
from torch import Tensor
from torch.nn import functional as F

from autoencoder.model import Autoencoder, latent_channels

LOGVAR_FLOOR = -30.0
LOGVAR_CEILING = 20.0


@dataclass(frozen=True)
class Moments:
    """Gaussian posterior over raw latents, at least float32. A VQ autoencoder has none: its logvar is LOGVAR_FLOOR."""

    mean: Tensor  # [B, C, h, w]
    logvar: Tensor  # [B, C, h, w], in [-30, 20]

    def sample(self, noise: Tensor) -> Tensor:
        """mean + std * noise; noise is standard normal [B, C, h, w]."""
        return self.mean + torch.exp(0.5 * self.logvar) * noise

    def kl(self) -> Tensor:
        """KL(N(mean, exp(logvar)) || N(0, 1)) in nats, summed over C, h, w: [B] (arXiv 1312.6114, appendix B)."""
        return 0.5 * (self.mean.square() + self.logvar.exp() - 1.0 - self.logvar).sum(dim=(1, 2, 3))


class Quantised(NamedTuple):
    latents: Tensor  # [B, C, h, w], codes; the gradient goes straight through to the unquantised latents
    codebook_loss: Tensor  # scalar: mean over elements of (code - sg[z])^2 + beta (z - sg[code])^2
    indices: Tensor  # [B, h, w], int64


class ScaledPair(NamedTuple):
    latents: Tensor  # [B, C, h', w']
    images: Tensor  # [B, 3, H', W']


def encode(autoencoder: Autoencoder, images: Tensor) -> Moments:
    """Images [B, 3, H, W] in [-1, 1] -> moments of raw latents [B, C, h, w].

    For a VQ autoencoder the mean is the latent before quantisation: the U-Net learns it, and decoding quantises.

    Raises:
        ValueError: a side is not a multiple of the downsampling factor.
    """
    factor = 2 ** (len(autoencoder.config.block_out_channels) - 1)
    height, width = images.shape[-2:]
    if height % factor or width % factor:
        raise ValueError(
            f"image size: found {width} x {height}; allowed is a multiple of {factor} along both sides; resize or crop"
        )
    if isinstance(autoencoder, VQModel):
        mean = _at_least_float32(autoencoder.encode(images).latents)
        return Moments(mean, torch.full_like(mean, LOGVAR_FLOOR, requires_grad=False))
    posterior = autoencoder.encode(images).latent_dist
    logvar = _at_least_float32(posterior.logvar).clamp(LOGVAR_FLOOR, LOGVAR_CEILING)
    return Moments(_at_least_float32(posterior.mean), logvar)


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def quantise(autoencoder: Autoencoder, latents: Tensor) -> Quantised:
    """Nearest codes of raw latents [B, C, h, w], with the loss that trains codebook and encoder.

    VQ-VAE, arXiv 1711.00937, eq. 3: the codes are drawn to the latents with weight 1, the latents to the codes with
    weight beta (0.25). The `commit_loss` of diffusers has the two swapped (its `legacy` quantizer, as in CompVis'
    code), so we do not use it.

    Raises:
        ValueError: the autoencoder has no codebook.
    """
    if not isinstance(autoencoder, VQModel):
        raise ValueError(
            "quantise: found an autoencoder without a codebook; allowed is kind vq; use its samples instead"
        )
    codebook = autoencoder.quantize.embedding.weight  # [K, C]
    with torch.autocast(latents.device.type, enabled=False):
        latents = _at_least_float32(latents)
        flat = latents.permute(0, 2, 3, 1).flatten(0, 2)  # [B h w, C]
        nearest = torch.cdist(flat.detach(), codebook.detach().to(flat.dtype)).argmin(dim=1)  # [B h w]
        indices = nearest.view(latents.shape[0], *latents.shape[2:])  # [B, h, w]
        codes = F.embedding(indices, codebook).to(latents.dtype).permute(0, 3, 1, 2)  # [B, C, h, w]
        beta = autoencoder.quantize.beta
        loss = F.mse_loss(codes, latents.detach()) + beta * F.mse_loss(latents, codes.detach())
        return Quantised(latents + (codes - latents).detach(), loss, indices)


def decode(autoencoder: Autoencoder, latents: Tensor, *, quantised: bool = False) -> Tensor:
    """Raw latents [B, C, h, w] -> images [B, 3, H, W], about [-1, 1], not clamped.

    Args:
        quantised: the latents are codes already (`quantise`), so a VQ autoencoder need not look them up again.
    """
    if not (quantised and isinstance(autoencoder, VQModel)):
        return autoencoder.decode(latents).sample
    spatial = latents if autoencoder.config.norm_type == "spatial" else None
    return autoencoder.decoder(autoencoder.post_quant_conv(latents), spatial)


def to_unet(autoencoder: Autoencoder, latents: Tensor) -> Tensor:
    """Raw -> scaled latents: (z - shift) * scale. The only place of latent scaling, with its inverse below."""
    shift, scale = _scaling(autoencoder, latents)
    return (latents - shift) * scale


def from_unet(autoencoder: Autoencoder, latents: Tensor) -> Tensor:
    """Scaled -> raw latents: the inverse of `to_unet`."""
    shift, scale = _scaling(autoencoder, latents)
    return latents / scale + shift


def _scaling(autoencoder: Autoencoder, latents: Tensor) -> tuple[Tensor | float, Tensor | float]:
    config = autoencoder.config
    scale = config.scaling_factor
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is None or std is None:
        return config.get("shift_factor") or 0.0, scale
    # As diffusers' SDXL pipelines do for the few autoencoders that carry per-channel values.
    shift = latents.new_tensor(mean).view(1, -1, 1, 1)
    return shift, scale / latents.new_tensor(std).view(1, -1, 1, 1)


class LatentStatistics:
    """Streaming per-channel statistics of posterior SAMPLES, over images and positions, in float64 on the CPU.

    All state is additive, so halves merge by `merge`, and ranks by all-reducing `sums` with SUM.
    """

    def __init__(self, channels: int) -> None:
        self.channels = channels
        # count; sum of means [C]; sum of exp(logvar) [C]; sum of outer products of means [C, C]
        self.sums = torch.zeros(1 + 2 * channels + channels * channels, dtype=torch.float64)

    def update(self, moments: Moments) -> None:
        mean = moments.mean.detach().cpu().double().transpose(0, 1).flatten(1)  # [C, B h w]
        noise = moments.logvar.detach().cpu().double().exp().transpose(0, 1).flatten(1)  # [C, B h w]
        count = torch.tensor([mean.shape[1]], dtype=torch.float64)
        self.sums += torch.cat([count, mean.sum(1), noise.sum(1), (mean @ mean.T).flatten()])

    def merge(self, other: LatentStatistics) -> None:
        self.sums += other.sums

    @property
    def count(self) -> int:
        """Latent positions seen (images x h x w)."""
        return round(self.sums[0].item())

    @property
    def mean(self) -> Tensor:
        """[C], float64."""
        return self._share(self.sums[1 : 1 + self.channels])

    @property
    def covariance(self) -> Tensor:
        """[C, C], float64: covariance of the means, plus the mean posterior variance on the diagonal."""
        start = 1 + 2 * self.channels
        outer = self._share(self.sums[start:]).view(self.channels, self.channels)
        noise = self._share(self.sums[1 + self.channels : start])
        return outer - torch.outer(self.mean, self.mean) + torch.diag(noise)

    @property
    def std(self) -> Tensor:
        """[C], float64: the root of var(mean) + E[exp(logvar)]."""
        return self.covariance.diagonal().clamp_min(0.0).sqrt()

    @property
    def overall_std(self) -> Tensor:
        """Scalar, float64: the deviation of all latents from their one mean, whatever their channel."""
        return (self.std.square() + (self.mean - self.mean.mean()).square()).mean().sqrt()

    def _share(self, sums: Tensor) -> Tensor:
        if not self.count:
            raise ValueError("latent statistics: found no images; allowed is one or more; call update first")
        return sums / self.sums[0]


def fold_normalisation(autoencoder: Autoencoder, mean: Tensor, std: Tensor, covariance: Tensor | None = None) -> None:
    """Put the latent normalisation into the weights, in place: unit latents, same images, `scaling_factor` 1.

    KL: z' = (z - mean) / std in every channel, exactly, by `quant_conv` (moments) and `post_quant_conv`.

    VQ: nearest neighbours must stay, so z' = R (z - mean) / s with one factor s = sqrt(mean(std^2)), for the codebook
    too. Without `covariance` R is the identity, and only the mean variance over channels is one. With it R is the
    rotation that gives every channel the same variance, hence one; a rotation keeps all distances.

    Do this after training: optimiser state and EMA copies refer to the weights before.

    Args:
        mean, std: [C], of raw latents, from `LatentStatistics`.
        covariance: [C, C], `vq` only.

    Raises:
        ValueError: a std is not positive and finite, or the autoencoder lacks the 1x1 convolutions to fold into.
    """
    mean, std = mean.detach().cpu().double(), std.detach().cpu().double()
    _check_foldable(autoencoder, mean, std)
    with torch.no_grad():
        if isinstance(autoencoder, VQModel):
            _fold_codebook(autoencoder, mean, std.square().mean().sqrt(), equal_variance_rotation(covariance, std))
        else:
            _fold_moments(autoencoder, mean, std)
    unscaled = {"scaling_factor": 1.0, "shift_factor": None, "latents_mean": None, "latents_std": None}
    autoencoder.register_to_config(**{key: value for key, value in unscaled.items() if key in autoencoder.config})


def _check_foldable(autoencoder: Autoencoder, mean: Tensor, std: Tensor) -> None:
    channels = latent_channels(autoencoder)
    for name, value in (("mean", mean), ("std", std)):
        if value.shape != (channels,):
            raise ValueError(
                f"{name}: found shape {tuple(value.shape)}; allowed is ({channels},), one per latent channel"
            )
    if not (mean.isfinite().all() and std.isfinite().all() and (std > 0).all()):
        raise ValueError(
            f"std: found {[round(value, 6) for value in std.tolist()]}; allowed is positive and finite; a channel that "
            "never varies carries nothing, so train longer or use fewer latent_channels"
        )
    for name in ("quant_conv", "post_quant_conv"):
        if getattr(autoencoder, name) is None:
            raise ValueError(
                f"{name}: found none in this autoencoder; allowed is a 1x1 convolution to fold the latent scale into; "
                "keep its scaling_factor and shift_factor as they are"
            )
    if autoencoder.config.get("norm_type") == "spatial":
        raise ValueError("norm_type: found spatial, whose decoder sees the codes themselves; allowed is group to fold")


def _fold_moments(autoencoder: Autoencoder, mean: Tensor, std: Tensor) -> None:
    """Mean rows -> (W x + b - mean) / std; log-variance rows -> W x + b - 2 log std."""
    channels = len(mean)
    conv = autoencoder.quant_conv
    row_scale = torch.cat([1.0 / std, torch.ones(channels, dtype=torch.float64)])
    row_shift = torch.cat([-mean / std, -2.0 * std.log()])
    _set(conv.weight, _cpu(conv.weight) * row_scale.view(-1, 1, 1, 1))
    _set(conv.bias, _cpu(conv.bias) * row_scale + row_shift)
    _fold_inverse(autoencoder, torch.diag(std), mean)


def _fold_codebook(autoencoder: Autoencoder, mean: Tensor, factor: Tensor, rotation: Tensor) -> None:
    conv, codes = autoencoder.quant_conv, autoencoder.quantize.embedding.weight
    matrix = rotation / factor  # z' = matrix (z - mean)
    _set(conv.weight, torch.einsum("ij,jkhw->ikhw", matrix, _cpu(conv.weight)))
    _set(conv.bias, matrix @ (_cpu(conv.bias) - mean))
    _set(codes, (_cpu(codes) - mean) @ matrix.T)
    _fold_inverse(autoencoder, rotation.T * factor, mean)


def _fold_inverse(autoencoder: Autoencoder, matrix: Tensor, mean: Tensor) -> None:
    """post_quant_conv gets z' and first undoes the fold: z = matrix z' + mean. Exact, since it is 1x1 (no padding)."""
    conv = autoencoder.post_quant_conv
    weight = _cpu(conv.weight)[:, :, 0, 0]  # [out, C]
    _set(conv.weight, (weight @ matrix)[:, :, None, None])
    _set(conv.bias, _cpu(conv.bias) + weight @ mean)


def _cpu(parameter: Tensor) -> Tensor:
    return parameter.detach().cpu().double()


def _set(parameter: Tensor, value: Tensor) -> None:
    parameter.copy_(value.to(parameter))


def equal_variance_rotation(covariance: Tensor | None, std: Tensor) -> Tensor:
    """A rotation R [C, C], float64, for which R covariance R^T has a constant diagonal (identity without covariance).

    Each plane rotation gives one channel the mean variance exactly, so C - 1 of them do (Bendel and Mickey 1978).
    """
    rotation = torch.eye(len(std), dtype=torch.float64)
    if covariance is None:
        return rotation
    covariance = covariance.detach().cpu().double()
    target = covariance.diagonal().mean()
    for _ in range(len(std) - 1):
        variances = (rotation @ covariance @ rotation.T).diagonal()
        low, high = int(variances.argmin()), int(variances.argmax())
        if variances[high] - variances[low] <= 1e-12 * target:
            break
        rotation = _plane_rotation(rotation @ covariance @ rotation.T, low, high, target) @ rotation
    return rotation


def _plane_rotation(covariance: Tensor, low: int, high: int, target: Tensor) -> Tensor:
    """Rotate in the plane (low, high) so that channel `low` gets variance `target`, which lies between the two.

    With t = tan(angle) the new variance is (a + 2 b t + d t^2) / (1 + t^2). Below, a and d are less the target, so
    that d t^2 + 2 b t + a = 0.
    """
    a, b, d = covariance[low, low] - target, covariance[low, high], covariance[high, high] - target
    root = torch.sqrt((b * b - a * d).clamp_min(0.0))  # a <= 0 <= d
    tangent = (-b + root) / d if d > 0 else torch.zeros_like(a)
    cosine = 1.0 / torch.sqrt(1.0 + tangent * tangent)
    plane = torch.eye(len(covariance), dtype=torch.float64)
    plane[low, low] = plane[high, high] = cosine
    plane[low, high], plane[high, low] = tangent * cosine, -tangent * cosine
    return plane


def scale_equivariance(latents: Tensor, images: Tensor, factor: float) -> ScaledPair:
    """Latents and images shrunk by the same factor: the decoder should map one to the other (EQ-VAE, arXiv 2502.09509).

    Args:
        latents: [B, C, h, w], raw, samples of the posterior.
        images: [B, 3, H, W], H and W multiples of h and w.
        factor: in (0, 1]; the latent side is rounded to whole pixels, and the image follows it exactly.
    """
    if not 0.0 < factor <= 1.0:
        raise ValueError(f"factor: found {factor}; allowed is above 0 up to 1; the helper only shrinks")
    height, width = (max(1, round(side * factor)) for side in latents.shape[-2:])
    pixels_high, pixels_wide = (images.shape[i] // latents.shape[i] for i in (-2, -1))
    if (height, width) == tuple(latents.shape[-2:]):
        return ScaledPair(latents, images)
    return ScaledPair(_shrunk(latents, height, width), _shrunk(images, height * pixels_high, width * pixels_wide))


def _shrunk(tensor: Tensor, height: int, width: int) -> Tensor:
    return F.interpolate(tensor, size=(height, width), mode="bilinear", align_corners=False, antialias=True)

"""Bits per dimension of a whole model on images with their conditions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from diffusers import VQModel

from autoencoder.latents import decode, encode, to_unet
from conditioning.conditions import Conditions
from ldm.data.sample import Batch
from ldm.evaluation.autoencoder_share import AutoencoderShare, ShareMeter
from ldm.evaluation.likelihood import (
    STRATA,
    LatentBatch,
    Variance,
    VariationalBound,
    measure_errors,
    variational_bound,
)
from ldm.noise import NoiseSchedule
from ldm.pipeline_conditions import tell
from ldm.pipeline_model import LatentDiffusionModel
from ldm.pipeline_request import Request
from ldm.randomness import normal_for_each
from ldm.sampling import noise_config_of


@dataclass(frozen=True)
class Likelihood:
    """The latents' bound for each choice of variances, the tightest first, and the autoencoder's share."""

    bounds: tuple[VariationalBound, ...]
    share: AutoencoderShare | None
    """None for a VQ autoencoder, which has no posterior density: the bounds are then of latents alone."""

    def lines(self) -> list[str]:
        """What a report prints."""
        tightest = self.bounds[0]
        if self.share is None:
            return [tightest.line(), "no bits per pixel: a VQ autoencoder has no posterior density"]
        return [tightest.line(), self.share.line()]


@torch.no_grad()
def measure_likelihood(
    model: LatentDiffusionModel, batches: Iterable[Batch], *, seed: int = 0, strata: int = STRATA
) -> Likelihood:
    """The bound of every image in `batches` under its own caption, map and label, as far as the model takes them.

    No condition is guided: the bound is of the network itself. Masks are left out (the whole picture is unknown).
    `strata` + 1 calls of the network a batch. Raises `UserError` for flow models and without images.
    """
    schedule = NoiseSchedule.from_config(noise_config_of(model.noise_scheduler))
    meter = None if isinstance(model.vae, VQModel) else ShareMeter()
    errors = measure_errors(_latents(model, batches, meter, seed), schedule, seed=seed, strata=strata)
    variances: tuple[Variance, ...] = ("small", "large", "fitted")
    bounds = sorted((variational_bound(errors, name) for name in variances), key=lambda bound: bound.total.value)
    return Likelihood(tuple(bounds), None if meter is None else meter.result(bounds[0]))


def _latents(
    model: LatentDiffusionModel, batches: Iterable[Batch], meter: ShareMeter | None, seed: int
) -> Iterator[LatentBatch]:
    count = 0
    for batch in batches:
        if batch.images is None:
            raise TypeError("bits per dimension are measured on batches with images")
        numbers = range(count, count + len(batch))
        count = numbers.stop
        images = batch.images.to(model.device)
        moments = encode(model.vae, images.to(model.vae.dtype))
        noise = normal_for_each(numbers, moments.mean.shape[1:], seed, "bound posterior").to(moments.mean)
        raw = moments.sample(noise)  # [B, C, h, w]
        if meter is not None:
            meter.update(model.vae, moments, images, decode(model.vae, raw.to(model.vae.dtype)))
        conditions = _conditions(model, batch, *images.shape[-2:])
        yield LatentBatch(
            to_unet(model.vae, raw).float(),
            lambda noisy, t, told=conditions: model.predict(noisy, t, told).float(),  # type: ignore[misc]
        )


def _conditions(model: LatentDiffusionModel, batch: Batch, height: int, width: int) -> Conditions:
    """What the U-Net is told of the batch's pictures."""
    taken = model.conditions
    request = Request(
        list(batch.captions),
        [""] * len(batch),
        height,
        width,
        maps=list(batch.semantic) if batch.semantic is not None and "semantic" in taken else None,
        labels=batch.labels if "label" in taken else None,
    )
    return tell(model, request, tuple(name for name in taken if name in request.given()))[-1]

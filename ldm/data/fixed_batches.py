"""The same images every time: for validation, latent statistics and reports, where nothing may be random."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ldm.data.sample import BadSample, Sample, Source
from ldm.data.sources import DataConfig
from ldm.data.transforms import transform
from ldm.errors import UserError


def spread_indices(length: int, count: int) -> list[int]:
    """At most `count` indices, evenly spread over 0..length-1, so that no class of a sorted folder is left out."""
    count = min(length, count)
    return [i * length // count for i in range(count)]


def fixed_samples(source: Source, config: DataConfig, count: int) -> Iterator[tuple[Sample, Tensor]]:
    """Up to `count` samples with their image, float32 [3, R, R] in [-1, 1], centre-cropped. Bad samples are left out.

    Raises `UserError` if not one image can be used.
    """
    found = False
    for index in spread_indices(len(source), count):
        try:
            sample = source.read(index)
            image = transform(sample, config, None).image
        except BadSample:
            continue
        if image is not None:
            found = True
            yield sample, image
    if not found:
        raise UserError(
            f"data: none of {min(count, len(source))} images can be read; `ldm data check` lists the reasons"
        )


def fixed_images(source: Source, config: DataConfig, count: int, batch_size: int = 16) -> Iterator[Tensor]:
    """Batches [B, 3, R, R] of `fixed_samples`."""
    batch: list[Tensor] = []
    for _, image in fixed_samples(source, config, count):
        batch.append(image)
        if len(batch) == batch_size:
            yield torch.stack(batch)
            batch = []
    if batch:
        yield torch.stack(batch)


def distinct_captions(source: Source, count: int) -> Sequence[str]:
    """The first caption of samples spread over the source, each text once, at most `count`."""
    captions: dict[str, None] = {}
    for index in spread_indices(len(source), 64 * count):
        try:
            captions.setdefault(source.read(index, with_image=False).captions[0])
        except BadSample:
            continue
        if len(captions) == count:
            break
    return list(captions)

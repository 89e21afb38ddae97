"""The same images every time: for validation, latent statistics and reports, where nothing may be random."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ldm.data.loader import Item, Wanted, collate, make_item
from ldm.data.sample import BadSample, Batch, Sample, Source
from ldm.data.sources import DataConfig
from ldm.data.transforms import transform
from ldm.errors import UserError
from ldm.randomness import generator_for


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


def fixed_batches(
    source: Source,
    config: DataConfig,
    count: int,
    batch_size: int,
    wanted: Wanted,
    seed: int,
    label_names: Sequence[str] = (),
) -> Iterator[Batch]:
    """Batches of `fixed_samples` with the conditions that `wanted` names; the masks are drawn for (seed, position).

    Labels are numbered as in `label_names`, the training's, by name: this source may hold others, or in another order.
    """
    items: list[Item] = []
    positions = range(0)
    for position, (sample, _) in enumerate(fixed_samples(source, config, count)):
        tensors = transform(sample, config, None)
        if sample.label is not None and label_names:
            name = source.classes[sample.label]
            sample = replace(sample, label=label_names.index(name) if name in label_names else None)
        generator = generator_for(seed, "fixed mask", position)
        items.append(make_item(sample, sample.captions[0], tensors, config.resolution, None, wanted, generator))
        positions = range(positions.start, position + 1)
        if len(items) == batch_size:
            yield collate(items, positions)
            items, positions = [], range(position + 1, position + 1)
    if items:
        yield collate(items, positions)

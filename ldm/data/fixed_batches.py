"""The same images every time: for validation, latent statistics and reports, where nothing may be random."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ldm.data.loader import Item, Wanted, collate, make_item
from ldm.data.sample import UNKNOWN_CLASS, BadSample, Batch, Sample, Source
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
    semantic_names: Sequence[str] = (),
) -> Iterator[Batch]:
    """Batches of `fixed_samples` with the conditions that `wanted` names; the masks are drawn for (seed, position).

    Labels and classes of maps are numbered as in `label_names` and `semantic_names`, the training's, by name: this
    source may hold others, or in another order. Samples that cannot be used are left out.
    """
    items: list[Item] = []
    first = 0
    for sample, _ in fixed_samples(source, config, count):
        generator = generator_for(seed, "fixed mask", first + len(items))
        try:
            named = _by_name(sample, source, label_names, semantic_names)
            tensors = transform(named, config, None)
            items.append(make_item(named, named.captions[0], tensors, config.resolution, None, wanted, generator))
        except BadSample:
            continue
        if len(items) == batch_size:
            yield collate(items, range(first, first + len(items)))
            first, items = first + len(items), []
    if items:
        yield collate(items, range(first, first + len(items)))


def _by_name(sample: Sample, source: Source, label_names: Sequence[str], semantic_names: Sequence[str]) -> Sample:
    """The sample with the numbers that the names have in training; what training does not know becomes unknown."""
    if sample.label is not None and label_names and source.classes:
        name = source.classes[sample.label]
        sample = replace(sample, label=label_names.index(name) if name in label_names else None)
    theirs = tuple(source.semantic_classes)
    if sample.semantic is None or not semantic_names or not theirs or theirs == tuple(semantic_names):
        return sample
    table = np.full(256, UNKNOWN_CLASS, dtype=np.uint8)
    for number, name in enumerate(theirs):
        table[number] = semantic_names.index(name) if name in semantic_names else UNKNOWN_CLASS
    return replace(sample, semantic=Image.fromarray(table[np.asarray(sample.semantic)]))

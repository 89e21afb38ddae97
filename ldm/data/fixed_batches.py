"""The same images every time: for validation, latent statistics and reports, where nothing may be random."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from ldm.data.buckets import Size
from ldm.data.combined import distinct
from ldm.data.loader import Item, Wanted, collate, make_item
from ldm.data.naming import renumbering
from ldm.data.sample import BadSample, Batch, Sample, Source
from ldm.data.sources import DataConfig
from ldm.data.transforms import Geometry, Transformed, apply_geometry, size_for
from ldm.errors import UserError
from ldm.randomness import generator_for

Thing = TypeVar("Thing")


def spread_indices(length: int, count: int) -> list[int]:
    """At most `count` indices, evenly spread over 0..length-1, so that no class of a sorted folder is left out."""
    count = min(length, count)
    return [i * length // count for i in range(count)]


def fixed_samples(
    source: Source, config: DataConfig, count: int, prepare: Callable[[Sample], Sample] = lambda sample: sample
) -> Iterator[tuple[Sample, Transformed]]:
    """Up to `count` different samples, prepared, with their tensors, cut from the middle; bad ones are left out.

    An image is float32 [3, H, W] in [-1, 1], a square or of its bucket's size. Raises `UserError` if not one image can
    be used.
    """
    source = distinct(source)
    found = False
    for index in spread_indices(len(source), count):
        try:
            sample = prepare(source.read(index))
            tensors = apply_geometry(sample, size_for(sample, config), Geometry())
        except BadSample:
            continue
        found = True
        yield sample, tensors
    if not found:
        raise UserError(
            f"data: none of {min(count, len(source))} images can be read; `ldm data check` lists the reasons"
        )


def fixed_images(source: Source, config: DataConfig, count: int, batch_size: int = 16) -> Iterator[Tensor]:
    """Batches [B, 3, H, W] of `fixed_samples`, each of one size."""
    images = (tensors.image for _, tensors in fixed_samples(source, config, count) if tensors.image is not None)
    for batch in _of_one_size(((_size(image), image) for image in images), batch_size):
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
    """Batches of `fixed_samples`, each of one size, with the conditions that `wanted` names.

    A sample's position is its number among those that can be used; the masks are drawn for (seed, position). Labels and
    classes of maps are numbered as in `label_names` and `semantic_names`, the training's, by name: this source may hold
    others, or in another order. Samples that cannot be used are left out.
    """
    by_name = renumbering(source, label_names, semantic_names)

    def items() -> Iterator[tuple[Size, tuple[int, Item]]]:
        position = 0
        for sample, tensors in fixed_samples(source, config, count, by_name):
            if tensors.image is None:
                raise TypeError("a source read with its image gives an image")
            size = _size(tensors.image)
            generator = generator_for(seed, "fixed mask", position)
            try:
                item = make_item(sample, sample.captions[0], tensors, size, None, wanted, generator)
            except BadSample:
                continue
            yield size, (position, item)
            position += 1

    for batch in _of_one_size(items(), batch_size):
        yield collate([item for _, item in batch], [position for position, _ in batch])


def _of_one_size(things: Iterator[tuple[Size, Thing]], batch_size: int) -> Iterator[list[Thing]]:
    """Batches as soon as there are enough of one size, in order; at the end what is left of each size."""
    waiting: dict[Size, list[Thing]] = {}
    for size, thing in things:
        batch = waiting.setdefault(size, [])
        batch.append(thing)
        if len(batch) == batch_size:
            yield waiting.pop(size)
    yield from waiting.values()


def _size(image: Tensor) -> Size:
    return image.shape[-1], image.shape[-2]

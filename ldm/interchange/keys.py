"""Where a weight of our networks lies in a checkpoint of the original layout, and how its shape differs there.

One mapping serves both directions, so that writing is the inverse of reading by construction. diffusers has functions
for one direction only, which the tests hold this mapping against (`diffusers.loaders.single_file_utils`); beyond that
they turn missing weights into None, and drop the last text block by the number it has in Stable Diffusion 2.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Place:
    """A weight's place in a checkpoint.

    Attributes:
        key: its key there.
        part: (i, n) when it is the i-th of n equal parts stacked along the first dimension.
        is_conv: a matrix that lies there as a 1x1 convolution [out, in, 1, 1].
    """

    key: str
    part: tuple[int, int] = (0, 1)
    is_conv: bool = False


def stored_shapes(places: Mapping[str, Place], shapes: Mapping[str, Shape]) -> dict[str, Shape]:
    """The shape of each key of the checkpoint that holds weights of these `shapes`, both by name of ours."""
    stored: dict[str, Shape] = {}
    for name, place in places.items():
        shape = (shapes[name][0] * place.part[1], *shapes[name][1:])
        stored[place.key] = (*shape, 1, 1) if place.is_conv and len(shape) == 2 else shape
    return stored


def fits(found: Shape, stored: Shape) -> bool:
    """Whether a tensor of shape `found` can be read where `stored` is expected: some tools drop a 1x1 kernel."""
    return found == stored or (stored[2:] == (1, 1) and found in (stored[:2], stored[:3]))


def to_ours(
    places: Mapping[str, Place], read: Callable[[str], Tensor], shapes: Mapping[str, Shape]
) -> dict[str, Tensor]:
    """Our weights, float32, each with memory of its own; `read` gives the checkpoint's tensor of a key."""
    weights: dict[str, Tensor] = {}
    last_key, tensor = "", torch.empty(0)
    for name, place in places.items():
        if place.key != last_key:  # the parts of a stacked matrix follow one another: read it once
            last_key, tensor = place.key, read(place.key)
        index, count = place.part
        part = tensor.chunk(count)[index].reshape(shapes[name])
        # A copy even in float32: the file's own memory may lie unaligned, and then sums differ in the last bit.
        weights[name] = part.to(torch.float32, copy=True).contiguous()
    return weights


def to_stored(places: Mapping[str, Place], weights: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The checkpoint's tensors by key, on the CPU, contiguous, in `dtype`."""
    parts: dict[str, list[Tensor]] = {}
    for name, place in places.items():
        tensor = weights[name].detach().to("cpu", dtype)
        parts.setdefault(place.key, []).append(
            tensor[..., None, None] if place.is_conv and tensor.ndim == 2 else tensor
        )
    return {
        key: (torch.cat(tensors) if len(tensors) > 1 else tensors[0]).contiguous() for key, tensors in parts.items()
    }

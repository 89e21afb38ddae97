"""What is NaN or infinite in a training step, found without a host sync while all is well."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from ldm.data.sample import Batch


@dataclass(frozen=True)
class BatchSample:
    """A sample of the global batch of a step: with seed and step, all that its randomness depends on."""

    position: int
    key: str
    caption: str


class NotFinite(Exception):  # noqa: N818 - it names the thing found, as `BadSample` does
    """Something in update number `step` (from 0) is NaN or infinite; `values` says what, by name.

    The update has not been done, unless a name says "after the update".
    """

    def __init__(self, step: int, values: Mapping[str, float], samples: Sequence[BatchSample]) -> None:
        self.step, self.values, self.samples = step, dict(values), tuple(samples)
        super().__init__(f"step {step}: {', '.join(f'{name} = {value}' for name, value in values.items())}")


def samples_of(batch: Batch) -> list[BatchSample]:
    """The samples of a micro-batch, in its order."""
    return [BatchSample(*found) for found in zip(batch.positions, batch.keys, batch.captions, strict=True)]


def floating_tensors(batch: Batch) -> dict[str, Tensor]:
    """The floating tensors of a batch, [B, ...] each, by name."""
    parts: dict[str, Any] = {part.name: getattr(batch, part.name) for part in fields(batch)}
    if batch.moments is not None:
        parts["latents (mean)"], parts["latents (log-variance)"] = batch.moments
    return {name: part for name, part in parts.items() if isinstance(part, Tensor) and part.is_floating_point()}


def probe(tensors: Iterable[Tensor]) -> Tensor:
    """A scalar on the tensors' device: 0 where all is finite, else NaN. No host sync."""
    # x - x is 0 for a finite number and NaN for NaN and infinity.
    sums = [(tensor - tensor).sum(dtype=torch.float32) for tensor in tensors]
    return torch.stack(sums).sum() if sums else torch.zeros(())


def greatest_weight(parameters: Sequence[nn.Parameter]) -> Tensor:
    """The greatest |w|, a scalar on the device; NaN or infinite if one weight is. No host sync."""
    weights = [parameter.detach() for parameter in parameters]
    if not weights or weights[0].device.type != "cpu":  # elsewhere few calls count, and this is one for all weights
        return nn.utils.get_total_norm(weights, norm_type=math.inf)
    ends = [torch.aminmax(weight) for weight in weights]  # a quarter of the time of a norm on a CPU
    return torch.stack([torch.stack([end.max, -end.min]) for end in ends]).max()


def broken_values(values: Mapping[str, float]) -> dict[str, float]:
    """Those that are not finite."""
    return {name: value for name, value in values.items() if not math.isfinite(value)}


def broken_files(files: Mapping[str, Mapping[str, Tensor]]) -> dict[str, float]:
    """NaN by the name "FILE after the update", for each file of a checkpoint that would hold what is not finite."""
    return {f"{file} after the update": math.nan for file, named in files.items() if broken_tensors(named)}


def broken_tensors(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of the floating tensors that hold a number that is not finite. Waits for the device."""
    return [name for name, tensor in tensors.items() if tensor.is_floating_point() and not tensor.isfinite().all()]

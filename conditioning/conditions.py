"""Everything that the U-Net is told besides x_t and t, as one value."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

Index = int | slice | Sequence[int] | Tensor
CONDITIONS = ("inpainting", "semantic", "label", "text")
"""All there are, in the order in which guidance adds them: what fixes the structure first, text last."""


@dataclass(frozen=True, eq=False)
class Conditions:
    """The conditions of a batch; a part that is None is one that the network does not take.

    Attributes:
        context: [B, L, C], read by cross-attention (text).
        spatial: [B, S, h, w], concatenated after the noisy latents in the order mask, masked-image latents, semantic.
        class_embedding: [B, D], added to the time embedding.
    """

    context: Tensor | None = None
    spatial: Tensor | None = None
    class_embedding: Tensor | None = None

    def __post_init__(self) -> None:
        sizes = set()
        for name, dimensions in (("context", 3), ("spatial", 4), ("class_embedding", 2)):
            tensor = getattr(self, name)
            if tensor is None:
                continue
            if tensor.ndim != dimensions:
                raise ValueError(f"{name}: found shape {tuple(tensor.shape)}; allowed is {dimensions} dimensions")
            sizes.add(tensor.shape[0])
        if len(sizes) > 1:
            raise ValueError(
                f"conditions: found batch sizes {sorted(sizes)}; allowed is one for all; repeat the others"
            )

    def __len__(self) -> int:
        """The batch size. Raises ValueError when no part is set, since then there is none."""
        for tensor in (self.context, self.spatial, self.class_embedding):
            if tensor is not None:
                return tensor.shape[0]
        raise ValueError("conditions: found no part set; the batch size is unknown; take it from the latents")

    def __bool__(self) -> bool:
        """Always true: `if conditions` asks whether there is such an object, not whether its batch is empty."""
        return True

    def __getitem__(self, index: Index) -> Conditions:
        """Some samples of the batch, by slice, mask or indices; a single number keeps the batch dimension."""
        if isinstance(index, int):
            index = [index]
        return self._map(lambda tensor: tensor[index])

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Conditions:
        """The same conditions on another device or in another floating type."""
        return self._map(lambda tensor: tensor.to(device=device, dtype=dtype))

    def repeat_interleave(self, repeats: int) -> Conditions:
        """Each sample `repeats` times in a row: a, b -> a, a, b, b."""
        return self._map(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    @staticmethod
    def cat(batches: Sequence[Conditions]) -> Conditions:
        """One batch out of several, which must have the same parts."""
        parts: dict[str, Tensor | None] = {}
        for field in fields(Conditions):
            tensors = [getattr(batch, field.name) for batch in batches]
            present = [tensor for tensor in tensors if tensor is not None]
            if present and len(present) != len(tensors):
                raise ValueError(f"{field.name}: found in some of the conditions only; allowed is all or none")
            parts[field.name] = torch.cat(present) if present else None
        return Conditions(**parts)

    def _map(self, function: Callable[[Tensor], Tensor]) -> Conditions:
        parts = {field.name: getattr(self, field.name) for field in fields(self)}
        return Conditions(**{name: None if part is None else function(part) for name, part in parts.items()})


def choose(keep: Tensor, kept: Tensor, other: Tensor) -> Tensor:
    """`kept` [B, ...] where `keep` [B] (bool) is true, else `other` [B or 1, ...], sample by sample."""
    return torch.where(keep.to(kept.device, non_blocking=True).view(-1, *[1] * (kept.ndim - 1)), kept, other)


def dropped(rate: float, uniforms: Tensor) -> Tensor:
    """Which samples lose a condition, bool [B]: those whose uniform number in [0, 1) is below `rate`.

    Each condition draws its own `uniforms`, so the conditions drop independently of each other.
    """
    return uniforms < rate

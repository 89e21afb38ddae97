"""All conditions of a model together: what the batch or the user gives -> what the U-Net reads."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor, nn

from conditioning.conditions import Conditions
from conditioning.label import LabelEncoder
from conditioning.semantic import SemanticEncoder
from conditioning.text import TextEncoder

CONDITION_PARTS = {
    "inpainting": ("mask", "masked_latents"),
    "semantic": ("semantic",),
    "label": ("labels",),
    "text": ("tokens", "context"),
}
"""The parts of `ConditionInputs` that belong to each of `CONDITIONS`."""


@dataclass(frozen=True, eq=False)
class ConditionInputs:
    """The conditions of a batch of B before they are encoded; None where the model has no such condition.

    A condition that is not given is one of these values, not None: the empty caption, a map of 255, the label -1, and
    for inpainting a mask of ones with the latents of a grey image.
    """

    tokens: Tensor | None = None
    """int64 [B, L]."""
    mask: Tensor | None = None
    """[B, 1, h, w] in [0, 1], 1 = repaint, at the size of the latents."""
    masked_latents: Tensor | None = None
    """[B, C, h, w], scaled for the U-Net; of the image whose hole is grey."""
    semantic: Tensor | None = None
    """int64 [B, H, W], 255 = unknown."""
    labels: Tensor | None = None
    """int64 [B], -1 = unknown."""
    context: Tensor | None = None
    """[B, L, C], text that is encoded already; `tokens` are then not used."""

    def replaced(self, names: Collection[str], other: ConditionInputs) -> ConditionInputs:
        """The conditions called `names` as in `other`, the rest as here."""
        parts = [part for name in names for part in CONDITION_PARTS[name]]
        return replace(self, **{part: getattr(other, part) for part in parts})


class ConditionEncoders(nn.Module):
    """The encoders of a model, None for the conditions that it has not; inpainting needs none."""

    def __init__(
        self,
        text: TextEncoder | None = None,
        semantic: SemanticEncoder | None = None,
        label: LabelEncoder | None = None,
    ) -> None:
        super().__init__()
        self.text = text
        self.semantic = semantic
        self.label = label

    @property
    def context_width(self) -> int | None:
        """Channels of `Conditions.context`; None without text."""
        return None if self.text is None else self.text.width

    @property
    def semantic_channels(self) -> int:
        """Channels of the semantic embedding; 0 without maps."""
        return 0 if self.semantic is None else self.semantic.channels

    @property
    def label_width(self) -> int | None:
        """Channels of `Conditions.class_embedding`; None without labels."""
        return None if self.label is None else self.label.width

    def train(self, mode: bool = True) -> Self:
        """Training mode, but never for a frozen encoder."""
        super().train(mode)
        for encoder in (self.text, self.semantic, self.label):
            if encoder is not None and not any(parameter.requires_grad for parameter in encoder.parameters()):
                encoder.eval()
        return self

    def forward(self, inputs: ConditionInputs, height: int, width: int) -> Conditions:
        """Conditions for latents of `height` x `width`.

        The spatial part is in the order mask, masked-image latents, semantic embedding (DESIGN.md 3).
        """
        spatial = [part for part in (inputs.mask, inputs.masked_latents) if part is not None]
        if self.semantic is not None and inputs.semantic is not None:
            spatial.append(self.semantic(inputs.semantic, height, width))  # [B, S, h, w]
        return Conditions(
            context=self._context(inputs),
            spatial=torch.cat([part.to(spatial[-1].dtype) for part in spatial], dim=1) if spatial else None,
            class_embedding=None if self.label is None or inputs.labels is None else self.label(inputs.labels),
        )

    def combined(self, nothing: Conditions, full: Conditions, names: Collection[str]) -> Conditions:
        """The conditions called `names` as in `full`, the others as in `nothing`: two results of `forward`."""

        def chosen(name: str) -> Conditions:
            return full if name in names else nothing

        masks, maps, spatial = chosen("inpainting").spatial, chosen("semantic").spatial, None
        if masks is not None and maps is not None:
            maps_from = masks.shape[1] - self.semantic_channels
            spatial = torch.cat([masks[:, :maps_from], maps[:, maps_from:]], dim=1)  # [B, S, h, w]
        return Conditions(chosen("text").context, spatial, chosen("label").class_embedding)

    def _context(self, inputs: ConditionInputs) -> Tensor | None:
        if self.text is None or inputs.context is not None or inputs.tokens is None:
            return inputs.context
        return self.text(inputs.tokens)  # [B, L, C]

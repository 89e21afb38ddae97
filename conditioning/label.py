"""Class labels as a condition: a label -> an embedding that is added to the time embedding."""

from __future__ import annotations

import difflib
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from conditioning.encoder_folder import read_config, read_weights, write_encoder
from conditioning.unknown import UNKNOWN_LABEL as UNKNOWN_LABEL


@dataclass(frozen=True, kw_only=True)
class LabelConfig:
    """How the U-Net is told a class label.

    `classes` is their number; None takes as many as the data names. `width` is that of the embedding, `dropout` the
    share of samples whose label is unknown in training.
    """

    classes: int | None = None
    width: int = 128
    dropout: float = 0.1

    def __post_init__(self) -> None:
        if self.classes is not None and self.classes < 1:
            raise ValueError(f"classes: found {self.classes}; allowed is 1 or more, or null for the data's; raise it")
        if self.width < 1:
            raise ValueError(f"width: found {self.width}; allowed is 1 or more; 128 is usual")
        if not 0 <= self.dropout <= 1:
            raise ValueError(f"dropout: found {self.dropout}; allowed is 0 to 1; 0.1 is usual")


class LabelEncoder(nn.Module):
    """Labels int64 [B] in 0..K-1, or -1 for unknown -> embedding [B, D]; "unknown" has a row of its own, the last."""

    FOLDER = "label_encoder"

    def __init__(self, classes: Sequence[str], width: int) -> None:
        super().__init__()
        if not classes:
            raise ValueError("classes: found none; allowed is one or more; name them, or leave the labels out")
        twice = [name for position, name in enumerate(classes) if name in classes[:position]]
        if twice:
            raise ValueError(f"classes: found {twice[0]!r} twice; allowed is once each; rename one")
        if width < 1:
            raise ValueError(f"width: found {width}; allowed is 1 or more; 128 is usual")
        self.classes = tuple(classes)
        self.embedding = nn.Embedding(len(classes) + 1, width)

    @property
    def width(self) -> int:
        """Channels D of the embedding."""
        return self.embedding.embedding_dim

    def forward(self, labels: Tensor) -> Tensor:
        """The embedding [B, D] of `labels` int64 [B]. On the CPU it raises what `check` does."""
        if labels.device.type == "cpu":  # elsewhere the answer would hold up every step: check when they are read
            self.check(labels)
        return self.embedding(torch.where(labels == UNKNOWN_LABEL, len(self.classes), labels))  # [B, D]

    def check(self, labels: Tensor) -> None:
        """Raise ValueError that names the labels that are neither 0..K-1 nor -1."""
        bad = (labels < UNKNOWN_LABEL) | (labels >= len(self.classes))
        if bad.any():
            found = ", ".join(map(str, labels[bad].unique().tolist()))
            raise ValueError(f"label: found {found}; allowed is {self._range}, or {UNKNOWN_LABEL} for unknown; mend it")

    def unknown_labels(self, batch: int) -> Tensor:
        """Labels that say nothing, what a sample without the condition has: -1, int64 [B]."""
        return torch.full((batch,), UNKNOWN_LABEL, device=self.embedding.weight.device)

    def index_of(self, label: int | str) -> int:
        """The number of a class given by number or name; text that is no name but a number counts as one.

        Raises ValueError that tells the allowed range, and for a name the nearest one.
        """
        if isinstance(label, str):
            name = label.strip()
            if name in self.classes:
                return self.classes.index(name)
            if not name.lstrip("+-").isdecimal():
                raise ValueError(f"label: found {label!r}{self._nearest(name)}; allowed is a name or {self._range}")
            label = int(name)
        number = operator.index(label)
        if not 0 <= number < len(self.classes):
            raise ValueError(f"label: found {number}; allowed is {self._range}, or a name; leave it out for no label")
        return number

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `folder`/label_encoder: the class names and the weights (safetensors)."""
        write_encoder(Path(folder) / self.FOLDER, self, {"classes": list(self.classes), "width": self.width})

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> LabelEncoder:
        """Read what `save_pretrained` wrote. Raises FileNotFoundError if it is missing, ValueError if it is broken."""
        place = Path(folder) / cls.FOLDER
        classes, width = read_config(place, "width")
        with torch.device("meta"):  # the weights are read, none are drawn
            encoder = cls(classes, width)
        read_weights(place, encoder)
        return encoder

    @property
    def _range(self) -> str:
        last = len(self.classes) - 1
        return f"0 ({self.classes[0]}) to {last} ({self.classes[last]})"

    def _nearest(self, name: str) -> str:
        folded = {known.casefold(): known for known in self.classes}
        close = difflib.get_close_matches(name.casefold(), folded, n=1, cutoff=0.5)
        return f", nearest is {folded[close[0]]!r}" if close else ""

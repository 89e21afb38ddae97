"""Labels and classes of maps from one source's numbers to another's, by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from ldm.data.sample import UNKNOWN_CLASS, Sample, Source


@dataclass(frozen=True)
class Renumbering:
    """Where each number goes; None: the numbers stay."""

    labels: tuple[int | None, ...] | None
    """The new label of each old one; None inside: unknown there."""
    semantic: np.ndarray | None
    """uint8 [256], the new class of each old one."""

    def __call__(self, sample: Sample) -> Sample:
        """The sample with the new numbers."""
        if self.labels is not None and sample.label is not None:
            sample = replace(sample, label=self.labels[sample.label])
        if self.semantic is not None and sample.semantic is not None:
            sample = replace(sample, semantic=Image.fromarray(self.semantic[np.asarray(sample.semantic)]))
        return sample


def renumbering(source: Source, label_names: Sequence[str], semantic_names: Sequence[str]) -> Renumbering:
    """From the numbers of `source` to places in the lists of names; what they lack becomes unknown.

    Where either side has no names, the numbers stay.
    """
    labels = semantic = None
    if label_names and source.classes and tuple(source.classes) != tuple(label_names):
        place = {name: number for number, name in enumerate(label_names)}
        labels = tuple(place.get(name) for name in source.classes)
    theirs = tuple(source.semantic_classes)
    if semantic_names and theirs and theirs != tuple(semantic_names):
        place = {name: number for number, name in enumerate(semantic_names)}
        semantic = np.full(256, UNKNOWN_CLASS, dtype=np.uint8)
        semantic[: len(theirs)] = [place.get(name, UNKNOWN_CLASS) for name in theirs]
    return Renumbering(labels, semantic)

"""What a report sees images through: the extractors whose weights are there, and the references seen through each."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from autoencoder.model import Autoencoder
from ldm.data.sample import Source
from ldm.data.scenes import ScenesConfig
from ldm.errors import UserError
from ldm.evaluation.clip_model import ClipModel
from ldm.evaluation.extractors import ExtractorConfig, open_extractor
from ldm.evaluation.features import FeatureExtractor
from ldm.evaluation.reference import Reference
from ldm.evaluation.report_data import ReportData, reference_images


@dataclass(frozen=True)
class Eyes:
    """The extractors that could be opened, by name, and why the others could not."""

    opened: dict[str, FeatureExtractor] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)

    @property
    def clip(self) -> ClipModel | None:
        """The first that also reads text."""
        return next((one for one in self.opened.values() if isinstance(one, ClipModel)), None)

    @property
    def first(self) -> tuple[str, FeatureExtractor]:
        """The one that decides where one is enough. Raises `UserError` if there is none."""
        for name, extractor in self.opened.items():
            return name, extractor
        raise UserError(f"found no extractor: {'; '.join(self.missing.values())}")


def open_eyes(
    configs: Sequence[ExtractorConfig],
    side: int,
    autoencoder: Autoencoder,
    scenes: ScenesConfig | None,
    device: torch.device,
) -> Eyes:
    """Every extractor whose weights are there, for images of `side` pixels."""
    eyes = Eyes()
    for config in configs:
        name = "_".join(part for part in (config.kind, config.architecture) if part)
        try:
            eyes.opened[name] = open_extractor(
                config, resolution=side, autoencoder=autoencoder, scenes=scenes, device=device
            )
        except UserError as error:
            eyes.missing[name] = f"{error}. On the command line: --extractor {option_of(config)}=FILE"
    return eyes


def option_of(config: ExtractorConfig) -> str:
    """How the command line names it, without its weights."""
    return f"{config.kind}:{config.architecture}" if config.architecture else config.kind


def in_fp32(autoencoder: Autoencoder) -> Autoencoder:
    """The autoencoder to measure with: features in half precision would be others."""
    return autoencoder if autoencoder.dtype == torch.float32 else copy.deepcopy(autoencoder).float()


@dataclass(frozen=True)
class References:
    """Statistics of the data through each extractor, made when first asked for."""

    eyes: Eyes
    data: ReportData
    source: Source
    count: int
    """Images at most."""
    cache: Path
    _made: dict[str, Reference] = field(default_factory=dict)

    def through(self, name: str) -> Reference:
        """What the extractor called `name` sees."""
        if name not in self._made:
            extractor = self.eyes.opened[name]
            self._made[name] = reference_images(extractor, self.data, self.source, self.count, self.cache)
        return self._made[name]

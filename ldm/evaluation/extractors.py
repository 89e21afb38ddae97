"""Which extractor to see images through: the config, and opening what it names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch

from autoencoder.model import Autoencoder
from ldm.data.scenes import ScenesConfig
from ldm.errors import UserError
from ldm.evaluation.clip_model import open_clip_model
from ldm.evaluation.features import FeatureExtractor
from ldm.evaluation.inception import open_inception
from ldm.evaluation.latent_features import LatentExtractor
from ldm.evaluation.scene_features import SceneExtractor
from ldm.evaluation.timm_features import open_timm

ExtractorKind = Literal["inception", "openclip", "timm", "autoencoder", "scenes"]


@dataclass(frozen=True, kw_only=True)
class ExtractorConfig:
    """One extractor. Nothing is downloaded unless `download` says so."""

    kind: ExtractorKind = "autoencoder"
    architecture: str | None = None
    """openclip and timm: which network, by the library's name for it."""
    weights: str | None = None
    """inception, openclip, timm: a local file, or the folder that holds it."""
    allow_pickle: bool = False
    """inception: also open torch-fidelity's own .pth file, a pickle (read with weights_only)."""
    download: bool = False
    """Fetch the weights: inception's, an open_clip tag given as `weights`, or timm's default for the architecture."""

    def __post_init__(self) -> None:
        """Check every field; raise `ValueError` naming it."""
        kinds = get_args(ExtractorKind)
        if self.kind not in kinds:
            raise ValueError(f"kind: found {self.kind!r}; allowed is {', '.join(kinds)}; choose one of these")
        if self.kind in ("openclip", "timm") and not self.architecture:
            raise ValueError(f"architecture: found none for kind {self.kind}; allowed is a model's name; give it")
        if self.kind not in ("openclip", "timm") and self.architecture:
            raise ValueError(f"architecture: found {self.architecture} for kind {self.kind}; it has one; leave it out")


def open_extractor(
    config: ExtractorConfig,
    *,
    resolution: int,
    autoencoder: Autoencoder | None = None,
    scenes: ScenesConfig | None = None,
    device: torch.device | str = "cpu",
) -> FeatureExtractor:
    """The extractor that `config` names, for images of side `resolution`.

    `autoencoder` is ours, for that kind; it is used where it is and moved nowhere. `scenes` is the data's config, for
    that kind. Raises `UserError` in one line for what is not there.
    """
    if config.kind == "inception":
        return open_inception(config.weights, allow_pickle=config.allow_pickle, download=config.download, device=device)
    if config.kind == "openclip":
        return open_clip_model(str(config.architecture), config.weights, download=config.download, device=device)
    if config.kind == "timm":
        return open_timm(str(config.architecture), config.weights, download=config.download, device=device)
    if config.kind == "scenes":
        if scenes is None:
            raise UserError("extractor scenes: found other data; allowed are the built-in scenes; choose another")
        return SceneExtractor(scenes, resolution)
    if autoencoder is None:
        raise UserError("extractor autoencoder: found no autoencoder; name a model or run that has one")
    return LatentExtractor(autoencoder, resolution)

"""What the exact scorer measures in a picture of a scene, as numbers: features that mean something."""

from __future__ import annotations

import hashlib
from dataclasses import asdict

import torch
from PIL.Image import Image
from torch import Tensor

from ldm.data.scenes import ScenesConfig
from ldm.evaluation.features import NOT_RESIZED, Features
from ldm.evaluation.scenes import find_background, find_objects, pixels_of
from ldm.picture import to_pil


class SceneExtractor:
    """Background, how many of each shape and colour, where on average and how large. A `FeatureExtractor`.

    The features' covariance holds which go together, so FID over them tells whether the model draws everything as often
    as the data does, in the data's places. It says nothing of how clean the drawing is.
    """

    name = "scene attributes"
    resize_filter = NOT_RESIZED

    def __init__(self, config: ScenesConfig, resolution: int) -> None:
        self.resolution = resolution
        self._config = config
        described = repr(sorted(asdict(config).items(), key=lambda item: item[0]))
        self.weights = hashlib.sha256(described.encode()).hexdigest()[:16]

    def extract(self, images: Tensor) -> Features:
        """Square images [B, 3, H, W] in [-1, 1] -> features [B, D]."""
        return Features(torch.stack([self.measure(picture) for picture in to_pil(images)]))

    def measure(self, picture: Image) -> Tensor:
        """The same of one picture: [D]."""
        config, pixels = self._config, pixels_of(picture)
        background, colour = find_background(pixels, config)
        found = find_objects(pixels, background, colour, config)
        names = [sum(one.name == name for one in found) for name in config.object_names]
        colours = [sum(one.colour == name for one in found) for name in config.colour_names]
        places = [sum(getattr(one, part) for one in found) / max(1, len(found)) for part in ("x", "y", "side")]
        grounds = [float(background == name) for name in config.background_names]
        return torch.tensor([*grounds, *names, *colours, *places, len(found)], dtype=torch.float32)

"""Semantic maps as a condition: class indices [B, H, W] -> shares of the classes -> an embedding at latent size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor, nn

from conditioning.area import area_shares
from conditioning.class_file import UNKNOWN_CLASS
from conditioning.encoder_folder import read_config, read_weights, write_encoder

FORMATS = ("PNG", "TIFF", "BMP", "GIF")
"""Of index maps: lossy formats would change classes."""


@dataclass(frozen=True, kw_only=True)
class SemanticConfig:
    """How the U-Net is told a semantic map.

    `classes` is the path of a class file (conditioning/class_file.py); None takes the data's own class names.
    `channels` is the width of the embedding, `dropout` the share of samples whose map is unknown in training.
    """

    classes: str | None = None
    channels: int = 8
    dropout: float = 0.1

    def __post_init__(self) -> None:
        if self.channels < 1:
            raise ValueError(f"channels: found {self.channels}; allowed is 1 or more; 8 is usual")
        if not 0 <= self.dropout <= 1:
            raise ValueError(f"dropout: found {self.dropout}; allowed is 0 to 1; 0.1 is usual")


class SemanticEncoder(nn.Module):
    """Semantic maps int64 [B, H, W] -> [B, S, h, w], as in latent diffusion (arXiv 2112.10752, section 4.3.1).

    Each latent cell gets the shares of the classes inside it, "unknown" (255) being one of its own, and a 1x1
    convolution embeds them. So a thin class still counts, and no class is invented between two others.
    """

    FOLDER = "semantic_encoder"

    def __init__(self, classes: Sequence[str], channels: int) -> None:
        super().__init__()
        if not 1 <= len(classes) <= UNKNOWN_CLASS:
            raise ValueError(f"classes: found {len(classes)}; allowed is 1 to {UNKNOWN_CLASS}; give a class file")
        if channels < 1:
            raise ValueError(f"channels: found {channels}; allowed is 1 or more; 8 is usual")
        self.classes = tuple(classes)
        # The shares sum to 1, so a bias would add nothing that the weights cannot say.
        self.projection = nn.Conv2d(len(classes) + 1, channels, kernel_size=1, bias=False)
        # Like an embedding's: inside a region the channels have unit variance, as the latents beside them do.
        nn.init.normal_(self.projection.weight)

    @property
    def channels(self) -> int:
        """Channels S of the embedding."""
        return self.projection.out_channels

    def forward(self, maps: Tensor, height: int, width: int) -> Tensor:
        """The embedding [B, S, h, w] of `maps` int64 [B, H, W] at `height` x `width`; on the CPU checked by `check`."""
        return self.projection(self.shares(maps, height, width).to(self.projection.weight.dtype))  # [B, S, h, w]

    def shares(self, maps: Tensor, height: int, width: int) -> Tensor:
        """The share of each class in each latent cell, float32 [B, K + 1, h, w]; the last one is unknown."""
        if maps.device.type == "cpu":  # elsewhere the answer would hold up every step: check when the maps are read
            self.check(maps)
        classes = len(self.classes)
        return area_shares(torch.where(maps == UNKNOWN_CLASS, classes, maps), classes + 1, height, width)

    def check(self, maps: Tensor) -> None:
        """Raise ValueError that names the classes of `maps` (integers of any shape) that are out of range."""
        bad = (maps < 0) | ((maps >= len(self.classes)) & (maps != UNKNOWN_CLASS))
        if bad.any():
            found = ", ".join(map(str, maps[bad].unique().tolist()))
            allowed = f"0 to {len(self.classes) - 1}, or {UNKNOWN_CLASS} for unknown"
            raise ValueError(
                f"semantic map: found class {found}; allowed is {allowed}; mend the map, or use a model of more classes"
            )

    def unknown_map(self, batch: int, height: int, width: int) -> Tensor:
        """Maps that say nothing, what a sample without the condition has: 255, int64 [B, H, W]."""
        return torch.full((batch, height, width), UNKNOWN_CLASS, device=self.projection.weight.device)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `folder`/semantic_encoder: the class names and the weights (safetensors)."""
        config: dict[str, Any] = {"classes": list(self.classes), "channels": self.channels}
        write_encoder(Path(folder) / self.FOLDER, self, config)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> SemanticEncoder:
        """Read what `save_pretrained` wrote. Raises FileNotFoundError if it is missing, ValueError if it is broken."""
        place = Path(folder) / cls.FOLDER
        classes, channels = read_config(place, "channels")
        with torch.device("meta"):  # the weights are read, none are drawn
            encoder = cls(classes, channels)
        read_weights(place, encoder)
        return encoder


def read_map(source: str | Path | Image.Image) -> Tensor:
    """The class indices int64 [H, W] of an index map: a file or a picture, palette (its indices) or grey, 8 or 16 bit.

    They are not checked against the classes: `SemanticEncoder.check` does. Raises FileNotFoundError, and ValueError if
    it is no picture of these formats, or holds colours instead of indices.
    """
    if isinstance(source, Image.Image):
        return _indices(source, "semantic map")
    path = Path(source)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; allowed is an index map ({', '.join(FORMATS)}); check the path")
    try:
        with Image.open(path, formats=FORMATS) as image:
            # Pillow stretches grey of 2 or 4 bits to 0-255: undone here, as the numbers are classes.
            bits = {"L;2": 2, "L;4": 4}.get(str(image.tile[0].args) if image.tile else "")
            image.load()
            indices = _indices(ImageOps.exif_transpose(image), str(path))
    except UnidentifiedImageError as error:
        raise ValueError(
            f"{path}: found no picture of an allowed format; allowed is {', '.join(FORMATS)}; convert it"
        ) from error
    except (OSError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path}: it cannot be decoded ({reason}); save it again") from error
    return indices if bits is None else indices // (255 // (2**bits - 1))


def _indices(image: Image.Image, name: str) -> Tensor:
    if image.mode not in ("P", "L", "1", "I") and not image.mode.startswith("I;16"):
        raise ValueError(
            f"{name}: found pixels of mode {image.mode}, so colours; allowed are class indices (palette or grey); "
            "convert it with `ldm data maps`"
        )
    return torch.from_numpy(np.array(image).astype(np.int64))  # [H, W]

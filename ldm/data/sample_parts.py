"""What captions, maps and masks must be, whatever a sample is stored in."""

from __future__ import annotations

import numpy as np
from PIL import Image

from ldm.data.sample import UNKNOWN_CLASS, BadSample

CLASSES_NAME = "classes.txt"
"""The class file of the semantic maps, see conditioning/class_file.py."""


def caption_lines(content: bytes) -> tuple[str, ...]:
    """The captions of a caption file, one a line; ("",) if it has none. Raises `ValueError` if it is no UTF-8."""
    lines = content.decode("utf-8-sig").splitlines()
    return tuple(line.strip() for line in lines if line.strip()) or ("",)


def check_size(part: Image.Image, image: Image.Image | None, key: str, name: str) -> None:
    """Raise `BadSample` unless the map or mask, called `name`, has the size of its image (None: was not read)."""
    if image is not None and part.size != image.size:
        sizes = f"{part.width}x{part.height}, the image {image.width}x{image.height}"
        raise BadSample(key, f"{name} is {sizes}; they must be of one size")


def check_classes(semantic: Image.Image, classes: tuple[str, ...], key: str, name: str) -> None:
    """Raise `BadSample` if the map, called `name`, has a class that none of `classes` names; () allows all."""
    if not classes:
        return
    values = np.asarray(semantic)
    highest = int(values[values != UNKNOWN_CLASS].max(initial=0))
    if highest >= len(classes):
        allowed = f"{CLASSES_NAME} names 0 to {len(classes) - 1}, and 255 is unknown"
        raise BadSample(key, f"{name} has class {highest}; {allowed}")

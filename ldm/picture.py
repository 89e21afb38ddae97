"""Generated images on their way out: to Pillow, to a captioned grid, to a PNG that says how it was made."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from ldm.errors import UserError

CELL_WIDTH = 160
"""Pixels: pictures in a grid are enlarged to at least this width, so that a caption finds room under them."""
GAP = 8
MOST_LINES = 6


def to_unit(images: Tensor) -> Tensor:
    """Images [B, 3, H, W] in [-1, 1] -> float32 in [0, 1] on the CPU; what lies outside is clamped."""
    return (images.float() / 2 + 0.5).clamp(0, 1).cpu()


def to_numpy(images: Tensor) -> np.ndarray:
    """Images [B, 3, H, W] in [-1, 1] -> float32 array [B, H, W, 3] in [0, 1]."""
    return to_unit(images).permute(0, 2, 3, 1).numpy()


def to_pil(images: Tensor) -> list[Image.Image]:
    """Images [B, 3, H, W] in [-1, 1] -> B RGB pictures, rounded to 8 bits exactly as diffusers does."""
    pixels = (to_numpy(images) * 255).round().astype(np.uint8)  # [B, H, W, 3]
    return [Image.fromarray(array) for array in pixels]


def grid(
    images: Sequence[Image.Image], captions: Sequence[str] | None = None, columns: int | None = None
) -> Image.Image:
    """The pictures row by row on white, each above its caption; captions wrap, and are cut after six lines.

    Pictures narrower than CELL_WIDTH are enlarged by a whole factor without smoothing, so that every pixel of theirs is
    a square. `columns` defaults to the square root of their number. Raises ValueError without pictures, and when
    there are more or fewer captions than pictures.
    """
    if not images or (captions is not None and len(captions) != len(images)):
        raise ValueError(f"found {len(images)} images and {len(captions or ())} captions; allowed is as many of each")
    pictures = [_enlarged(image) for image in images]
    columns = min(columns or math.ceil(math.sqrt(len(pictures))), len(pictures))
    width = max(picture.width for picture in pictures)
    size = max(14, width // 24)
    font = ImageFont.load_default(size)
    texts = [wrap(caption, font, width) for caption in captions] if captions is not None else [""] * len(pictures)
    rows = [range(first, min(first + columns, len(pictures))) for first in range(0, len(pictures), columns)]
    line = math.ceil(size * 1.3)
    heights = [max(pictures[i].height + _text_height(texts[i], line) for i in row) for row in rows]
    canvas = Image.new("RGB", (columns * (width + GAP) + GAP, sum(heights) + GAP * (len(rows) + 1)), "white")
    draw = ImageDraw.Draw(canvas)
    top = GAP
    for row, height in zip(rows, heights, strict=True):
        for column, i in enumerate(row):
            left = GAP + column * (width + GAP)
            canvas.paste(pictures[i], (left, top))
            for number, words in enumerate(texts[i].split("\n")):
                draw.text((left, top + pictures[i].height + 4 + number * line), words, fill="black", font=font)
        top += height + GAP
    return canvas


def _enlarged(image: Image.Image) -> Image.Image:
    factor = max(1, math.ceil(CELL_WIDTH / image.width))
    return image.convert("RGB").resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def _text_height(text: str, line: int) -> int:
    return 4 + line * len(text.split("\n")) if text else 0


def wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """`text` in lines of at most `width` pixels, broken at spaces, or inside a word that is too long by itself."""
    lines: list[str] = []
    current = ""
    for word in text.split():
        if current and font.getlength(f"{current} {word}") <= width:
            current = f"{current} {word}"
            continue
        if current:
            lines.append(current)
        while len(word) > 1 and font.getlength(word) > width:
            cut = max(1, next(n for n in range(len(word), 0, -1) if n == 1 or font.getlength(word[:n]) <= width))
            lines.append(word[:cut])
            word = word[cut:]
        current = word
    lines += [current] if current else []
    if len(lines) > MOST_LINES:
        lines = [*lines[: MOST_LINES - 1], lines[MOST_LINES - 1][:-3] + "..."]
    return "\n".join(lines)


def parameters_text(
    prompt: str,
    negative_prompt: str = "",
    *,
    steps: int,
    sampler: str,
    guidance_scale: float,
    seed: int,
    size: tuple[int, int],
    model: str,
) -> str:
    """How a picture was made, as AUTOMATIC1111's web UI writes it and many tools read it; `size` is (width, height)."""
    negative = f"\nNegative prompt: {negative_prompt}" if negative_prompt else ""
    return (
        f"{prompt}{negative}\nSteps: {steps}, Sampler: {sampler}, CFG scale: {guidance_scale:g}, Seed: {seed}, "
        f"Size: {size[0]}x{size[1]}, Model: {model}"
    )


def save_png(image: Image.Image, path: str | Path, parameters: str | None = None) -> None:
    """Write a PNG whole or not at all; `parameters` goes into the text chunk of that name.

    The file is written beside its final name, synced and renamed. Raises UserError if the folder is missing or full.
    """
    path = Path(path)
    information = PngInfo()
    if parameters is not None:
        information.add_text("parameters", parameters)
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with partial.open("wb") as file:
            image.save(file, format="PNG", pnginfo=information)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from error
    finally:
        partial.unlink(missing_ok=True)


def read_parameters(path: str | Path) -> str | None:
    """The `parameters` text of a PNG, or None if it has none."""
    with Image.open(path, formats=["PNG"]) as image:
        image.load()
        return image.info.get("parameters")

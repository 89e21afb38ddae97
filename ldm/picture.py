"""Generated images on their way out: to Pillow, to a captioned grid, to a file that says how it was made."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from ldm.files import whole_file

CELL_WIDTH = 160
"""Pixels: pictures in a grid are enlarged to at least this width, so that a caption finds room under them."""
GAP = 8
MOST_LINES = 6
EXIF_DETAILS, EXIF_USER_COMMENT = 0x8769, 0x9286
"""The tags of EXIF's own directory and, in it, of the comment (Exif 2.3, 4.6.3 and 4.6.5)."""


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


def colour_map(semantic: Tensor | np.ndarray) -> Image.Image:
    """A semantic map [H, W] as an RGB picture: a colour of its own for every class, black for unknown (255).

    The colours are those of the PASCAL VOC palette: bits of the class number, spread over the channels.
    """
    classes = np.asarray(semantic).astype(np.uint32)
    colours = np.zeros((*classes.shape, 3), dtype=np.uint8)
    rest: np.ndarray = classes + 1
    for bit in range(7, -1, -1):
        for channel in range(3):
            colours[..., channel] |= (((rest >> channel) & 1) << bit).astype(np.uint8)
        rest = rest >> 3
    colours[classes == 255] = 0
    return Image.fromarray(colours)


def mask_picture(mask: Tensor) -> Image.Image:
    """A mask float [1, H, W] in [0, 1] as a picture of mode L, white = repaint."""
    return Image.fromarray((mask[0].cpu().numpy() * 255).round().astype(np.uint8))


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


def strip(images: Sequence[Image.Image]) -> Image.Image:
    """RGB pictures of one size side by side, without gaps. Raises ValueError without pictures."""
    if not images:
        raise ValueError("found no pictures; allowed is one or more")
    width, height = images[0].size
    canvas = Image.new("RGB", (width * len(images), height))
    for column, image in enumerate(images):
        canvas.paste(image, (column * width, 0))
    return canvas


def parameters_text(
    prompt: str,
    negative_prompt: str = "",
    *,
    steps: int,
    sampler: str,
    guidance_scale: float | Mapping[str, float],
    seed: int,
    size: tuple[int, int],
    model: str,
    extra: Mapping[str, object] | None = None,
) -> str:
    """How a picture was made, as AUTOMATIC1111's web UI writes it and many tools read it; `size` is (width, height).

    `extra` comes after the model, under its names there if it has any: "Denoising strength", "Mask blur", ... Of
    several guidance scales CFG scale is that of the text, and Guidance names them all.
    """
    negative = f"\nNegative prompt: {negative_prompt}" if negative_prompt else ""
    named = guidance_scale if isinstance(guidance_scale, Mapping) else {}
    facts: dict[str, object] = {
        "Steps": steps,
        "Sampler": sampler,
        "CFG scale": guidance_scale if not isinstance(guidance_scale, Mapping) else named.get("text", 1.0),
        "Seed": seed,
        "Size": f"{size[0]}x{size[1]}",
        "Model": model,
    }
    if named:
        facts["Guidance"] = ", ".join(f"{name}={scale:g}" for name, scale in named.items())
    facts |= extra or {}
    settings = ", ".join(f"{name}: {_quoted(value)}" for name, value in facts.items())
    return f"{prompt}{negative}\n{settings}".strip()


def _quoted(value: object) -> str:
    """Text that holds a separator in quotes, as the web UI does, so that it can be read back."""
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return json.dumps(text, ensure_ascii=False) if any(mark in text for mark in ',:"\n') else text


def save_png(image: Image.Image, path: str | Path, parameters: str | None = None) -> None:
    """Write a PNG whole or not at all; `parameters` goes into the text chunk of that name. Raises UserError."""
    information = PngInfo()
    if parameters is not None:
        information.add_text("parameters", parameters)
    with whole_file(path) as partial:
        image.save(partial, format="PNG", pnginfo=information)


def save_animation(
    images: Sequence[Image.Image],
    path: str | Path,
    kind: Literal["gif", "webp"],
    frames_per_second: float,
    parameters: str = "",
) -> None:
    """Write RGB pictures of one size as an animation that repeats for ever, whole or not at all.

    WebP keeps every pixel; a GIF has 256 colours a frame and times in hundredths of a second. `parameters` goes into
    the GIF's comment and the WebP's EXIF user comment. Raises UserError if it cannot be written.
    """
    milliseconds = round(1000 / frames_per_second)
    if kind == "gif":
        frames = [image.quantize() for image in images]
        options: dict[str, object] = {"comment": parameters.encode(), "optimize": False}
    else:
        frames, exif = list(images), Image.Exif()
        exif.get_ifd(EXIF_DETAILS)[EXIF_USER_COMMENT] = b"UNICODE\0" + parameters.encode("utf-16-be")
        options = {"lossless": True, "exif": exif}
    with whole_file(path) as partial:
        frames[0].save(
            partial,
            format=kind.upper(),
            save_all=True,
            append_images=frames[1:],
            duration=milliseconds,
            loop=0,
            **options,
        )


def read_parameters(path: str | Path) -> str | None:
    """The `parameters` text of a PNG, or None if it has none."""
    with Image.open(path, formats=["PNG"]) as image:
        image.load()
        return image.info.get("parameters")

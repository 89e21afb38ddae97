"""Image files to 8-bit RGB, index maps and masks; the same to tensors and back.

Only the formats of `FORMATS` are opened. Pillow's pixel limit stays on. A failure is a `BadSample` with a plain reason.
"""

from __future__ import annotations

import errno
import io
import os
import stat
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
from PIL import ExifTags, Image, ImageFile, ImageOps, UnidentifiedImageError

from ldm.data.sample import BadSample

if TYPE_CHECKING:
    from torch import Tensor

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")
SUFFIXES = frozenset({".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif"})

_DECODER_ERRORS = (OSError, SyntaxError, ValueError, EOFError, LookupError, TypeError, OverflowError, struct.error)
"""What Pillow's decoders raise for broken files (they parse foreign bytes, so not only OSError)."""
_SIXTEEN_BIT = ("I;16", "I;16B", "I;16L", "I;16N")


def open_image(file: str | Path | bytes, *, key: str | None = None) -> Image.Image:
    """The picture in `file` (a path or the file's bytes) as 8-bit RGB.

    EXIF rotation is applied, transparency is put on white, grey, palette, CMYK and 16-bit pixels are converted, and an
    animation gives its first frame. Colour profiles are not applied. Raises `BadSample(key, reason)`.
    """
    with _readable(file, key):
        return to_rgb(_load(file))


def open_semantic(file: str | Path | bytes, *, key: str | None = None) -> Image.Image:
    """The index map in `file`: mode L, values = palette indices or grey values. Raises `BadSample`."""
    with _readable(file, key):
        image, bits = _load_with_bits(file)
        if image.mode == "P":
            return Image.fromarray(np.asarray(image, dtype=np.uint8))
        if image.mode == "1":
            return Image.fromarray(np.asarray(image).astype(np.uint8))
        if image.mode in _SIXTEEN_BIT:
            values = np.asarray(image)
            if values.max() > 255:
                raise ValueError(f"a semantic map with class {values.max()}: classes are 0 to 254, and 255 is unknown")
            return Image.fromarray(values.astype(np.uint8))
        if image.mode == "L":
            return image if bits is None else Image.fromarray(np.asarray(image) // (255 // (2**bits - 1)))
        raise ValueError(f"a semantic map must hold class indices (palette or grey); its pixels are {image.mode}")


def open_mask(file: str | Path | bytes, *, key: str | None = None) -> Image.Image:
    """The mask in `file`: mode L, 255 = repaint. Transparency is put on black ("keep"). Raises `BadSample`."""
    with _readable(file, key):
        return to_rgb(_load(file), background=0).convert("L")


def read_header(file: str | Path | bytes, *, key: str | None = None) -> tuple[int, int]:
    """Width and height as `open_image` will give them, from the file's header alone: no pixel is decoded.

    EXIF rotation counts, but for a PNG that has it after its pixels. Raises `BadSample`.
    """
    with _readable(file, key), _opened(file) as image:
        if image.format == "TIFF":  # Pillow turns its size when it opens the file
            return image.size
        # The base class's method: that of PNG decodes the picture to look for EXIF behind it.
        turned = Image.Image.getexif(image).get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
        return image.size[::-1] if turned else image.size


def to_tensor(image: Image.Image) -> Tensor:
    """An RGB image as float32 [3, H, W] in [-1, 1]."""
    import torch  # here, so that `ldm data check` starts without it

    pixels = torch.from_numpy(np.array(image, dtype=np.uint8))  # [H, W, 3]
    return pixels.permute(2, 0, 1).to(torch.float32, memory_format=torch.contiguous_format).div_(127.5).sub_(1.0)


def to_pil(image: Tensor) -> Image.Image:
    """float [3, H, W] in [-1, 1] (values outside are clamped) as an RGB image; undoes `to_tensor` exactly."""
    import torch

    pixels = (image.detach().float().clamp(-1, 1) + 1).mul(127.5).round().to(torch.uint8)
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())


@contextmanager
def _readable(file: str | Path | bytes, key: str | None) -> Iterator[None]:
    """Turn the errors of reading `file` into a `BadSample`."""
    try:
        yield
    except (*_DECODER_ERRORS, zlib.error, Image.DecompressionBombError) as error:
        name = key if key is not None else "image" if isinstance(file, bytes) else str(file)
        raise BadSample(name, _reason(error, file)) from error


def _load(file: str | Path | bytes) -> Image.Image:
    """First frame, decoded, turned as EXIF says."""
    return _load_with_bits(file)[0]


def open_plain(path: str | Path) -> BinaryIO:
    """Open a file to read, but no pipe or device, which would wait or go on for ever. Raises OSError."""
    # O_NONBLOCK: to open a pipe waits for one who writes. It is nothing to a plain file.
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return os.fdopen(descriptor, "rb")
    os.close(descriptor)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    raise OSError("it is no plain file but a pipe or a device")


@contextmanager
def _opened(file: str | Path | bytes) -> Iterator[ImageFile.ImageFile]:
    with (
        io.BytesIO(file) if isinstance(file, bytes) else open_plain(file) as stream,
        Image.open(stream, formats=FORMATS) as image,
    ):
        yield image


def _load_with_bits(file: str | Path | bytes) -> tuple[Image.Image, int | None]:
    """The same, and 2 or 4 for grey of so few bits, which Pillow stretches to 0-255; else None."""
    with _opened(file) as image:
        bits = {"L;2": 2, "L;4": 4}.get(str(image.tile[0].args) if image.tile else "")
        image.load()
        return ImageOps.exif_transpose(image), bits


def to_rgb(image: Image.Image, background: int = 255) -> Image.Image:
    """Any picture as 8-bit RGB; transparency is put on grey of value `background`. Raises ValueError for 32 bits."""
    if image.mode in ("I", "F"):
        raise ValueError("its pixels are 32-bit numbers of no defined range; save it with 8 or 16 bits")
    if image.mode in _SIXTEEN_BIT:
        image = _to_8_bit(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        canvas = Image.new("RGBA", image.size, (background, background, background, 255))
        return Image.alpha_composite(canvas, image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _to_8_bit(image: Image.Image) -> Image.Image:
    """16-bit grey to L, or to LA if one grey value stands for "transparent".

    The high byte is kept: exact for 8-bit pictures stored as 16 bits, by whichever of the two ways (v << 8 or v * 257),
    and what Pillow does to 16-bit colour.
    """
    values = np.asarray(image).astype(np.uint16)
    grey = Image.fromarray((values >> 8).astype(np.uint8))
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
    return grey


def _reason(error: Exception, file: str | Path | bytes) -> str:
    """Why a file could not be read, in words for people who did not write Pillow."""
    if isinstance(error, FileNotFoundError):
        return "no such file"
    if isinstance(error, IsADirectoryError):
        return "it is a folder"
    if isinstance(error, PermissionError):
        return "no permission to read it"
    if isinstance(error, OSError) and error.strerror:
        return f"it cannot be read ({error.strerror})"
    if isinstance(error, Image.DecompressionBombError):
        return f"too many pixels ({error})".replace(", could be decompression bomb DOS attack.", "")
    message = " ".join(str(error).split()).rstrip(".") or type(error).__name__
    if message.startswith("it is no plain file"):
        return message
    if isinstance(error, UnidentifiedImageError):
        return _what_it_is(_first_bytes(file))
    if "truncated" in message.lower() or isinstance(error, EOFError):
        return f"the file is cut short ({message})"
    return f"it cannot be decoded ({message})"


def _first_bytes(file: str | Path | bytes) -> bytes:
    if isinstance(file, bytes):
        return file[:64]
    with open_plain(file) as stream:
        return stream.read(64)


def _what_it_is(start: bytes) -> str:
    allowed = ", ".join(FORMATS)
    if not start:
        return "the file is empty"
    if start[4:8] == b"ftyp":
        brand = start[8:12].decode("ascii", "replace")
        return f"its format ({brand}: HEIC, AVIF or video) is not read; convert it to one of {allowed}"
    if all(byte in b"\t\n\r" or 32 <= byte < 127 for byte in start):
        return f"it holds text, not an image ({start[:24].decode('ascii').split(chr(10))[0].strip()!r} ...)"
    return f"it is not an image, or its header is broken; allowed are {allowed}"

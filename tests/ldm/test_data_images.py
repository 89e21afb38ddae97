"""Every kind of image file becomes the RGB that people see, or a BadSample with a plain reason."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ldm.data.images import open_image, open_mask, open_semantic, read_header, to_pil, to_tensor
from ldm.data.sample import BadSample

# Four colours that survive every lossless way of storing, laid out without any symmetry.
PIXELS = np.array([[[255, 0, 0], [0, 255, 0], [0, 0, 255]], [[255, 255, 255], [0, 0, 0], [255, 0, 0]]], dtype=np.uint8)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def pixels_of(file: bytes | Path) -> np.ndarray:
    image = open_image(file)
    assert image.mode == "RGB"
    return np.asarray(image)


@pytest.mark.parametrize(
    ("kind", "options"),
    [("PNG", {}), ("BMP", {}), ("TIFF", {}), ("TIFF", {"compression": "tiff_lzw"}), ("WEBP", {"lossless": True})],
)
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_lossless_formats_are_exact(kind: str, options: dict[str, object], mode: str) -> None:
    image = Image.fromarray(PIXELS).convert(mode)
    np.testing.assert_array_equal(pixels_of(encoded(image, kind, **options)), PIXELS)


def test_gif_and_path(tmp_path: Path) -> None:
    path = tmp_path / "image.gif"
    Image.fromarray(PIXELS).convert("P").save(path)
    np.testing.assert_array_equal(pixels_of(path), PIXELS)
    assert read_header(path) == (3, 2)


@pytest.mark.parametrize(("mode", "tolerance"), [("RGB", 3), ("L", 2), ("CMYK", 3)])
def test_jpeg_in_every_colour_space(mode: str, tolerance: int) -> None:
    colour = (200, 120, 40) if mode == "RGB" else 120 if mode == "L" else (0, 100, 200, 30)
    expected = {"RGB": (200, 120, 40), "L": (120, 120, 120), "CMYK": (225, 137, 49)}[mode]
    pixels = pixels_of(encoded(Image.new(mode, (16, 16), colour), "JPEG", quality=95))
    assert np.abs(pixels.astype(int) - expected).max() <= tolerance


def test_cmyk_tiff_is_converted() -> None:
    image = Image.new("CMYK", (2, 2), (255, 0, 0, 0))
    assert (pixels_of(encoded(image, "TIFF")) == (0, 255, 255)).all()


def test_alpha_is_put_on_white() -> None:
    image = Image.new("RGBA", (3, 1), (255, 0, 0, 255))
    image.putpixel((1, 0), (255, 0, 0, 0))
    image.putpixel((2, 0), (0, 0, 0, 51))  # a fifth of black
    np.testing.assert_array_equal(pixels_of(encoded(image, "PNG")), [[[255, 0, 0], [255, 255, 255], [204, 204, 204]]])
    grey = Image.new("LA", (2, 1), (10, 255))
    grey.putpixel((1, 0), (10, 0))
    np.testing.assert_array_equal(pixels_of(encoded(grey, "PNG")), [[[10, 10, 10], [255, 255, 255]]])


def test_palette_with_a_transparent_entry() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 0, 0])
    image.putpixel((1, 0), 1)
    np.testing.assert_array_equal(pixels_of(encoded(image, "PNG", transparency=1)), [[[10, 20, 30], [255, 255, 255]]])


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
@pytest.mark.parametrize("factor", [256, 257])
def test_sixteen_bit_grey_is_exact_for_eight_bit_pictures(kind: str, factor: int) -> None:
    grey = np.arange(256, dtype=np.uint16).reshape(16, 16)
    image = Image.fromarray(grey * np.uint16(factor))
    assert image.mode == "I;16"
    np.testing.assert_array_equal(pixels_of(encoded(image, kind)), np.repeat(grey[..., None], 3, axis=2))


def test_sixteen_bit_grey_with_a_transparent_value() -> None:
    image = Image.fromarray(np.array([[1000, 40000]], dtype=np.uint16))
    file = encoded(image, "PNG", transparency=40000)
    np.testing.assert_array_equal(pixels_of(file), [[[3, 3, 3], [255, 255, 255]]])


def test_sixteen_bit_colour_png() -> None:
    row = b"\0" + struct.pack(">6H", 0xFFFF, 0, 0x8000, 0x0100, 0x00FF, 0x1234)
    assert pixels_of(png(2, 1, 16, 2, zlib.compress(row))).tolist() == [[[255, 0, 128], [1, 0, 18]]]


def test_one_bit() -> None:
    image = Image.fromarray(np.array([[True, False]]))
    assert image.mode == "1"
    np.testing.assert_array_equal(pixels_of(encoded(image, "PNG")), [[[255] * 3, [0] * 3]])


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize(
    ("orientation", "stored"),
    [
        (1, PIXELS),
        (2, PIXELS[:, ::-1]),
        (3, PIXELS[::-1, ::-1]),
        (4, PIXELS[::-1]),
        (5, PIXELS.transpose(1, 0, 2)),
        (6, np.rot90(PIXELS, 1)),  # stored turned to the left, so it is shown turned to the right
        (7, PIXELS.transpose(1, 0, 2)[::-1, ::-1]),
        (8, np.rot90(PIXELS, -1)),
    ],
)
def test_exif_rotation_is_pixel_exact(kind: str, orientation: int, stored: np.ndarray) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    options: dict[str, object] = {"lossless": True} if kind == "WEBP" else {}
    file = encoded(Image.fromarray(np.ascontiguousarray(stored)), kind, exif=exif, **options)
    np.testing.assert_array_equal(pixels_of(file), PIXELS)


def test_exif_rotation_of_jpeg() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.new("RGB", (32, 16), (0, 0, 0))
    image.paste((255, 255, 255), (0, 0, 16, 16))  # white on the left as stored = white on top as shown
    pixels = pixels_of(encoded(image, "JPEG", exif=exif, quality=95))
    assert pixels.shape == (32, 16, 3)
    assert pixels[:12].min() > 240
    assert pixels[20:].max() < 15


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_animations_give_their_first_frame(kind: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255))]
    options: dict[str, object] = {"lossless": True} if kind == "WEBP" else {}
    file = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert (pixels_of(file) == (255, 0, 0)).all()


def png(width: int, height: int, depth: int, colour: int, data: bytes) -> bytes:
    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def noise(kind: str, **options: object) -> bytes:
    values = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    return encoded(Image.fromarray(values), kind, **options)


BROKEN = {
    "empty": (b"", "the file is empty"),
    "text": (b"<html><body>404 Not Found</body></html>", "it holds text, not an image"),
    "heic": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "its format (heic"),
    "foreign": (bytes(range(128, 228)), "it is not an image, or its header is broken"),
    "cut jpeg": (noise("JPEG")[:900], "the file is cut short"),
    "cut png": (noise("PNG")[:3000], "the file is cut short"),
    "cut webp": (noise("WEBP", lossless=True)[:3000], "it cannot be decoded"),
    "cut gif": (noise("GIF")[:2000], "the file is cut short"),
    "bomb": (png(50_000, 50_000, 8, 2, zlib.compress(b"\0")), "too many pixels"),
    "32-bit": (encoded(Image.new("I", (2, 2), 70000), "TIFF"), "it cannot be decoded (its pixels are 32-bit"),
    "float": (encoded(Image.new("F", (2, 2), 0.5), "TIFF"), "it cannot be decoded (its pixels are 32-bit"),
    "not allowed": (encoded(Image.fromarray(PIXELS), "PPM"), "it is not an image, or its header is broken"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_say_why(name: str, tmp_path: Path) -> None:
    content, reason = BROKEN[name]
    path = tmp_path / "x.jpg"
    path.write_bytes(content)
    for file in (content, path):
        with pytest.raises(BadSample) as caught:
            open_image(file, key="the key")
        assert caught.value.key == "the key"
        assert caught.value.reason.startswith(reason)
        assert "\n" not in str(caught.value)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(BadSample, match="no such file"):
        open_image(tmp_path / "none.png")
    with pytest.raises(BadSample, match="it is a folder"):
        open_image(tmp_path)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(["JPEG", "PNG", "GIF", "BMP", "WEBP"]), st.data())
def test_damaged_files_are_read_or_refused(kind: str, data: st.DataObject) -> None:
    file = bytearray(encoded(Image.fromarray(PIXELS), kind))
    for _ in range(data.draw(st.integers(1, 4))):
        file[data.draw(st.integers(0, len(file) - 1))] = data.draw(st.integers(0, 255))
    try:
        assert open_image(bytes(file)).mode == "RGB"
    except BadSample as error:
        assert error.reason


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_header_tells_the_size_that_the_image_will_have(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[274] = orientation
    file = encoded(Image.new("RGB", (7, 4)), kind, exif=exif)
    assert read_header(file) == open_image(file).size
    if kind not in ("BMP", "GIF"):  # these hold no EXIF
        assert read_header(file) == ((4, 7) if orientation > 4 else (7, 4))


def test_header_alone_does_not_decode(tmp_path: Path) -> None:
    path = tmp_path / "cut.jpg"
    path.write_bytes(noise("JPEG")[:900])
    assert read_header(path) == (64, 64)
    png = noise("PNG")
    assert read_header(png[: len(png) // 2]) == (64, 64)
    (tmp_path / "empty.jpg").touch()
    with pytest.raises(BadSample, match="the file is empty"):
        read_header(tmp_path / "empty.jpg")


def test_semantic_maps_keep_their_indices() -> None:
    indices = np.array([[0, 3], [7, 255]], dtype=np.uint8)
    palette = Image.fromarray(indices)
    palette.putpalette([value for i in range(256) for value in (255 - i, i, 7)])
    for image in (Image.fromarray(indices), palette, Image.fromarray(indices.astype(np.uint16))):
        semantic = open_semantic(encoded(image, "PNG"))
        assert semantic.mode == "L"
        np.testing.assert_array_equal(np.asarray(semantic), indices)


def test_one_bit_semantic_map_has_classes_0_and_1() -> None:
    semantic = open_semantic(encoded(Image.fromarray(np.array([[True, False]])), "PNG"))
    assert np.asarray(semantic).tolist() == [[1, 0]]


def test_semantic_maps_that_are_none() -> None:
    with pytest.raises(BadSample, match="class 300"):
        open_semantic(encoded(Image.fromarray(np.full((2, 2), 300, dtype=np.uint16)), "PNG"), key="k")
    with pytest.raises(BadSample, match="its pixels are RGB"):
        open_semantic(encoded(Image.fromarray(PIXELS), "PNG"), key="k")


def test_masks_put_transparency_on_black() -> None:
    image = Image.new("RGBA", (2, 1), (255, 255, 255, 0))
    image.putpixel((1, 0), (255, 255, 255, 255))
    assert np.asarray(open_mask(encoded(image, "PNG"))).tolist() == [[0, 255]]


def test_tensor_round_trip_is_exact() -> None:
    values = np.arange(256 * 3, dtype=np.uint64).reshape(16, 16, 3).astype(np.uint8)
    tensor = to_tensor(Image.fromarray(values))
    assert tensor.shape == (3, 16, 16)
    assert tensor.dtype == torch.float32
    assert tensor.is_contiguous()
    assert (tensor.min(), tensor.max()) == (-1, 1)
    np.testing.assert_array_equal(np.asarray(to_pil(tensor)), values)
    assert to_pil(torch.full((3, 1, 1), 7.0)).getpixel((0, 0)) == (255, 255, 255)


def test_bad_sample_survives_pickling() -> None:
    import pickle

    error = pickle.loads(pickle.dumps(BadSample("a", "why")))
    assert (error.key, error.reason, str(error)) == ("a", "why", "a: why")

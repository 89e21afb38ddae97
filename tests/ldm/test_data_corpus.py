"""Every kind of file that a folder from the internet may hold: used as people see it, or quarantined by name.

`FolderSource.read`, `size` and `ldm data check` must agree on each.
"""

from __future__ import annotations

import io
import json
import os
import struct
import tracemalloc
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms

from ldm.cli.main import main
from ldm.data.check import check_folder
from ldm.data.folder import FolderSource
from ldm.data.loader import TrainingBatches
from ldm.data.quarantine import Quarantine
from ldm.data.sample import BadSample
from ldm.data.sources import DataConfig
from ldm.errors import UserError

RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def halves(left: tuple[int, ...] = RED, right: tuple[int, ...] = BLUE, mode: str = "RGB") -> Image.Image:
    """16 x 8: one colour on the left, another on the right."""
    image = Image.new(mode, (16, 8), left if len(left) > 1 else left[0])
    image.paste(right if len(right) > 1 else right[0], (8, 0, 16, 8))
    return image


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png(*extra: bytes, width: int = 16, height: int = 8) -> bytes:
    """`halves` with more chunks before the pixels; another size is a lie."""
    pixels = np.asarray(halves())
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + b"".join(extra) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


@cache
def inflating(megabytes: int) -> bytes:
    """A kilobyte for each of the megabytes that it inflates to."""
    packer = zlib.compressobj(9)
    zeros = bytes(1 << 20)
    return b"".join(packer.compress(zeros) for _ in range(megabytes)) + packer.flush()


def turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned to the right
    return exif


def transparent() -> Image.Image:
    """A palette whose second colour is transparent, the third half so."""
    image = Image.new("P", (16, 8), 0)
    image.putpalette([*RED, 0, 255, 0, 0, 0, 0])
    image.paste(1, (8, 0, 16, 8))
    return image


def frames(kind: str, **options: Any) -> bytes:
    return saved(halves(), kind, save_all=True, append_images=[halves(BLUE, RED)], duration=100, **options)


LATER = {"lossless": True}
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
USED: dict[str, tuple[bytes, Image.Image, int]] = {
    "plain.png": (png(), halves(), 0),
    "jpeg.png": (saved(halves(), "JPEG", quality=95, subsampling=0), halves(), 40),
    "gif.png": (saved(halves(), "GIF"), halves(), 0),
    "tiff.png": (saved(halves(), "TIFF"), halves(), 0),
    "webp.jpg": (saved(halves(), "WEBP", lossless=True), halves(), 0),
    "cmyk.jpg": (saved(halves((0, 255, 255, 0), (255, 255, 0, 0), "CMYK"), "JPEG", quality=95), halves(), 45),
    "cmyk.tif": (saved(halves((0, 255, 255, 0), (255, 255, 0, 0), "CMYK"), "TIFF"), halves(), 0),
    "palette.png": (saved(transparent(), "PNG", transparency=b"\xff\x00"), halves(RED, WHITE), 0),
    "palette.gif": (saved(transparent(), "GIF", transparency=1), halves(RED, WHITE), 0),
    "grey16.png": (
        saved(Image.fromarray(np.asarray(halves((10,), (200,), "L")).astype(np.uint16) * 257), "PNG"),
        halves((10, 10, 10), (200, 200, 200)),
        0,
    ),
    "one-bit.png": (saved(halves((0,), (255,), "L").convert("1"), "PNG"), halves((0, 0, 0), WHITE), 0),
    "one-bit.tif": (
        saved(halves((0,), (255,), "L").convert("1"), "TIFF", compression="group4"),
        halves((0, 0, 0), WHITE),
        0,
    ),
    "animated.gif": (frames("GIF"), halves(), 0),
    "animated.png": (frames("PNG"), halves(), 0),
    "animated.webp": (frames("WEBP", lossless=True), halves(), 0),
    "turned.png": (saved(halves(), "PNG", exif=turned()), halves().rotate(-90, expand=True), 0),
    "turned.jpg": (
        saved(halves(), "JPEG", exif=turned(), quality=95, subsampling=0),
        halves().rotate(-90, expand=True),
        40,
    ),
    "profile.png": (saved(halves(), "PNG", icc_profile=SRGB), halves(), 0),
    "profile-of-nothing.png": (saved(halves(), "PNG", icc_profile=b"no profile at all"), halves(), 0),
    "exif-of-nothing.jpg": (
        saved(halves(), "JPEG", exif=b"Exif\0\0no directory", quality=95, subsampling=0),
        halves(),
        40,
    ),
    "line\nbreak.png": (png(), halves(), 0),
    "\U0001f408 cat.png": (png(), halves(), 0),
    "no-utf8-\udcff.png": (png(), halves(), 0),
    ("n" * 250) + ".png": (png(), halves(), 0),
}
NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8))
GIF_BOMB = b"GIF89a" + struct.pack("<HHBBBcHHHHB", *[60_000] * 2, 0, 0, 0, b",", 0, 0, *[60_000] * 2, 0) + b"\x08\0"
REFUSED: dict[str, tuple[bytes, str]] = {
    "empty.png": (b"", "the file is empty"),
    "cut.png": (saved(NOISE, "PNG")[:2000], "the file is cut short"),
    "cut.jpg": (saved(halves(), "JPEG")[:-200], "the file is cut short"),
    "text.jpg": (b"only words\n", "it holds text, not an image"),
    "svg.png": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "it holds text, not an image"),
    "html.png": (b"<!DOCTYPE html><title>404</title>", "it holds text, not an image"),
    "postscript.png": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "it holds text, not an image"),
    "pdf.png": (b"%PDF-1.7\n\xe2\xe3\xcf\xd3\n" + bytes(64), "it is not an image"),
    "ppm.png": (saved(halves(), "PPM"), "it is not an image"),
    "icon.png": (saved(halves(), "ICO"), "it is not an image"),
    "float.tif": (saved(Image.new("F", (16, 8), 0.5), "TIFF"), "it cannot be decoded (its pixels are 32-bit numbers"),
    "bomb.png": (png(width=60_000, height=60_000), "too many pixels"),
    "bomb.gif": (GIF_BOMB, "too many pixels"),
    "bomb.bmp": (
        b"BM" + struct.pack("<IHHIIiiHHIIiiII", 1 << 20, 0, 0, 54, 40, 60_000, 60_000, 1, 24, 0, 0, 0, 0, 0, 0),
        "too many pixels",
    ),
    "text-bomb.png": (
        png(chunk(b"zTXt", b"k\0\0" + inflating(100))),
        "it cannot be decoded (Decompressed data too large",
    ),
    "itext-bomb.png": (
        png(chunk(b"iTXt", b"k\0\x01\0\0\0" + inflating(100))),
        "it cannot be decoded (Decompressed data too large",
    ),
    "profile-bomb.png": (
        png(chunk(b"iCCP", b"p\0\0" + inflating(100))),
        "it cannot be decoded (Decompressed data too large",
    ),
    "many-texts.png": (
        png(*(chunk(b"zTXt", b"k%d\0\0" % i + inflating(1)) for i in range(80))),
        "it cannot be decoded (Too much memory used",
    ),
}
"""Nothing of these is ever decoded whole."""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    for name, content in {**{n: f[0] for n, f in USED.items()}, **{n: f[0] for n, f in REFUSED.items()}}.items():
        (folder / name).write_bytes(content)
    (folder / "loop.png").symlink_to("loop.png")
    (folder / "dangling.png").symlink_to("nowhere.png")
    os.mkfifo(folder / "pipe.png")
    (folder / "device.png").symlink_to("/dev/zero")
    (folder / "folder.png").mkdir()
    return folder


ODD = {
    "loop.png": "it cannot be read (Too many levels of symbolic links)",
    "dangling.png": "no such file",
    "pipe.png": "it is no plain file",
    "device.png": "it is no plain file",
}


def test_all_are_used_as_people_see_them_or_quarantined_by_name(corpus: Path) -> None:
    source = FolderSource(corpus)
    assert {source.key(index) for index in range(len(source))} == {*USED, *REFUSED, *ODD}
    refused = {}
    for index in range(len(source)):
        name = source.key(index)
        try:
            image = source.read(index).image
        except BadSample as error:
            refused[error.key] = error.reason
            continue
        _, expected, tolerance = USED[name]
        assert image is not None and image.mode == "RGB" and image.size == expected.size == source.size(index), name
        difference = np.abs(np.asarray(image).astype(int) - np.asarray(expected))
        assert difference.max() <= tolerance, name
    reasons = {**{name: reason for name, (_, reason) in REFUSED.items()}, **ODD}
    assert refused.keys() == reasons.keys()
    for name, reason in reasons.items():
        assert refused[name].startswith(reason), (name, refused[name])
        assert "\n" not in refused[name]
    report = check_folder(corpus, progress=False)
    assert {problem.name: problem.reason for problem in report.unusable} == refused


def test_bombs_cost_neither_memory_nor_time(corpus: Path) -> None:
    """100 MB of text in 100 kB, and 3.6 thousand million pixels in 100 bytes."""
    source = FolderSource(corpus)
    bombs = [index for index in range(len(source)) if "bomb" in source.key(index) or "many" in source.key(index)]
    assert len(bombs) == 7
    tracemalloc.start()
    try:
        for index in bombs:
            with suppress(BadSample):
                source.read(index)
            with suppress(BadSample):
                source.size(index)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 80 * 2**20  # Pillow allows 64 MiB of texts


def test_training_goes_on_and_the_quarantine_names_them_all(corpus: Path, tmp_path: Path) -> None:
    source = FolderSource(corpus)
    quarantine = Quarantine(tmp_path / "quarantine.jsonl", 0.9, len(source))
    config = DataConfig(root=str(corpus), resolution=8)
    for batch in TrainingBatches(source, config, batch_size=8, seed=0, start_step=0, end_step=len(source) // 8 + 1):
        assert batch.images is not None and batch.images.isfinite().all() and batch.images.abs().max() <= 1
        quarantine.record(batch.bad)
    lines = [json.loads(line) for line in (tmp_path / "quarantine.jsonl").read_text().splitlines()]
    assert {line["key"] for line in lines} == {*REFUSED, *ODD}


def test_the_command_prints_a_line_for_each(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (corpus / "two\nlines.jpg").write_bytes(b"")
    try:
        assert main(["data", "check", str(corpus)]) == 1
    finally:
        (corpus / "two\nlines.jpg").unlink()
    out = capsys.readouterr().out.splitlines()
    assert len(out) == len(REFUSED) + len(ODD) + 1 + 1
    assert r"two\nlines.jpg: the file is empty" in out


def test_a_file_that_vanishes_after_the_scan(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(png())
    source = FolderSource(tmp_path)
    (tmp_path / "b.png").unlink()
    assert source.read(0).image is not None
    for read in (source.read, source.size):
        with pytest.raises(BadSample, match=r"b\.png: no such file"):
            read(1)
    assert len(source.fingerprint) == 64


def test_folders_that_lead_back_or_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "a.png").write_bytes(png())
    (tmp_path / "cat" / "up").symlink_to(tmp_path)
    (tmp_path / "self").symlink_to("self")
    (tmp_path / "one").symlink_to("two")
    (tmp_path / "two").symlink_to("one")
    assert [FolderSource(tmp_path).key(i) for i in range(len(FolderSource(tmp_path)))] == ["cat/a.png"]
    real = os.scandir

    def refuse(path: Path) -> Any:
        if Path(path).name == "cat":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError, match=r"cat: it cannot be read, allow it .*: Permission denied$"):
        FolderSource(tmp_path)


CAPTIONS: dict[str, tuple[bytes, str | None]] = {
    "plain": (b"a cat\n", "a cat"),
    "mark": (b"\xef\xbb\xbfa cat", "a cat"),
    "windows": (b"a cat\r\n\r\n", "a cat"),
    "blank": (b" \n", ""),
    "emoji": ("\U0001f408".encode(), "\U0001f408"),
    "latin": ("café".encode("latin-1"), None),
    "utf16": ("a cat".encode("utf-16"), None),
    "nul": (b"a\0cat", "a\0cat"),
    "huge": (b"x" * (2 << 20), None),
}


def test_caption_files_in_every_encoding(tmp_path: Path) -> None:
    for name, (content, _) in CAPTIONS.items():
        (tmp_path / f"{name}.png").write_bytes(png())
        (tmp_path / f"{name}.txt").write_bytes(content)
    (tmp_path / "pipe.png").write_bytes(png())
    os.mkfifo(tmp_path / "pipe.txt")
    source = FolderSource(tmp_path)
    bad = {problem.name: problem.reason for problem in check_folder(tmp_path, progress=False).unusable}
    for index in range(len(source)):
        name = source.key(index).removesuffix(".png")
        expected = CAPTIONS.get(name, (b"", None))[1]
        if expected is not None:
            assert source.read(index).captions == (expected,), name
        else:
            with pytest.raises(BadSample, match=rf"its caption file {name}\.txt cannot be read"):
                source.read(index)
            assert bad.pop(f"{name}.png").startswith(f"its caption file {name}.txt cannot be read")
    assert bad == {}


ROWS: dict[str, bytes] = {
    "it is not JSON": b'{"file_name": "a.png", ',
    "it must be an object": b'["a.png"]',
    "file_name is missing": b'{"text": "a cat"}',
    "leaves the folder": b'{"file_name": "../a.png"}',
    "it is not JSON (it is nested too deeply)": b'{"file_name": "a.png", "x": '
    + b"[" * 100_000
    + b"]" * 100_000
    + b"}",
    "half a character": b'{"file_name": "a.png", "text": "\\ud83d"}',
    "file_name holds half a character": b'{"file_name": "\\ud83d.png"}',
    "it is not JSON ('utf-8' codec": '{"file_name": "a.png", "text": "café"}'.encode("latin-1"),
    "label is": b'{"file_name": "a.png", "label": -3}',
    "label is nan": b'{"file_name": "a.png", "label": NaN}',
}


@pytest.mark.parametrize("says", ROWS)
def test_broken_rows_stop_training_with_one_line_and_are_listed_by_the_check(tmp_path: Path, says: str) -> None:
    (tmp_path / "good.png").write_bytes(png())
    (tmp_path / "a.png").write_bytes(png())
    good = b'{"file_name": "good.png", "text": "fine"}'
    (tmp_path / "metadata.jsonl").write_bytes(b"\xef\xbb\xbf" + good + b"\n\n" + ROWS[says] + b"\n")
    with pytest.raises(UserError) as error:
        FolderSource(tmp_path)
    message = str(error.value)
    assert message.startswith("metadata.jsonl line 3: ") and says in message and len(message) < 400
    report = check_folder(tmp_path, progress=False)
    assert (report.usable, len(report.unusable)) == (1, 1)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv"])
def test_metadata_in_another_encoding_is_one_line(tmp_path: Path, encoding: str, name: str) -> None:
    (tmp_path / "a.png").write_bytes(png())
    row = 'file_name,text\na.png,"a cat"\n' if name.endswith("csv") else '{"file_name": "a.png", "text": "a cat"}\n'
    (tmp_path / name).write_bytes((row * 2).encode(encoding))
    with pytest.raises(UserError, match="UTF-8") as error:
        FolderSource(tmp_path)
    assert "\n" not in str(error.value)


def test_duplicates_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png())
    rows = [b'{"file_name": "a.png", "text": "one", "text": "two"}', b'{"file_name": "./x/../a.png", "text": "three"}']
    (tmp_path / "metadata.jsonl").write_bytes(b"\n".join(rows))
    with pytest.raises(UserError, match=r"a\.png: it has two rows in metadata\.jsonl"):
        FolderSource(tmp_path)
    (tmp_path / "metadata.jsonl").write_bytes(rows[0])
    assert FolderSource(tmp_path).read(0).captions == ("two",)  # as JSON readers do


@pytest.mark.parametrize("count", [20_000, pytest.param(2_000_000, marks=pytest.mark.slow)])
def test_millions_of_files_take_some_bytes_each_and_no_look_at_any(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    """A folder of so many names, simulated: what `os.scandir` gives is all that is asked of the system."""
    names = (f"image-{index * 7919 % count:09d}.png" for index in range(count))
    entries = (SimpleNamespace(name=name, is_dir=lambda: False) for name in names)

    @contextmanager
    def scandir(path: object) -> Iterator[Any]:
        yield entries

    looked_at: list[object] = []
    real = os.stat
    monkeypatch.setattr(os, "scandir", scandir)
    monkeypatch.setattr(os, "stat", lambda path, **options: looked_at.append(path) or real(path, **options))
    tracemalloc.start()
    try:
        source = FolderSource(tmp_path)
        kept, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(source) == count
    assert [source.key(index) for index in (0, 1, count - 1)] == [f"image-{i:09d}.png" for i in (0, 1, count - 1)]
    assert kept / count < 30  # 19 bytes of name and 8 of place
    assert peak / count < 250
    assert len(looked_at) < 10

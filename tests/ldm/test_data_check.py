"""`check_folder` finds every file that cannot be used, says why, and does not stop."""

from __future__ import annotations

import io
import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldm.data.check import Problem, check_folder
from ldm.data.folder import FolderSource
from ldm.data.sample import BadSample
from ldm.errors import UserError


def jpeg(seed: int = 0, size: int = 80) -> bytes:
    stream = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 255, (size, size + 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(stream, "JPEG")
    return stream.getvalue()


def bomb() -> bytes:
    """The start of a PNG of 3.6 thousand million pixels."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


BAD = {
    "bomb.png": (bomb(), "too many pixels"),
    "cut.jpg": (jpeg()[:2000], "the file is cut short"),
    "empty.png": (b"", "the file is empty"),
    "text.jpg": (b"no picture, only words", "it holds text"),
}


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    for index in range(5):
        (tmp_path / f"good{index}.jpg").write_bytes(jpeg(index))
        (tmp_path / f"good{index}.txt").write_text("a caption")
    for name, (content, _) in BAD.items():
        (tmp_path / name).write_bytes(content)
    return tmp_path


def test_every_bad_file_is_listed_with_its_reason(corpus: Path) -> None:
    heard: list[Problem] = []
    report = check_folder(corpus, progress=False, on_unusable=heard.append)
    assert {problem.name for problem in report.unusable} == set(BAD)
    for problem in report.unusable:
        assert problem.reason.startswith(BAD[problem.name][1])
    assert heard == report.unusable
    assert (report.images, report.usable) == (9, 5)
    # The header pass comes first: only the file that is cut short has a good header.
    assert [problem.name for problem in report.unusable] == ["bomb.png", "empty.png", "text.jpg", "cut.jpg"]
    assert report.warnings == {}
    assert report.short_sides == (80, 80, 80)
    assert report.summary() == (f"{corpus}: 5 of 9 images can be used, 4 cannot; short sides 80 to 80 px (median 80)")


@pytest.mark.parametrize("threads", [1, 4])
def test_check_and_training_agree(corpus: Path, threads: int) -> None:
    found = {problem.name for problem in check_folder(corpus, progress=False, threads=threads).unusable}
    source = FolderSource(corpus)
    refused = set()
    for index in range(len(source)):
        try:
            source.read(index)
        except BadSample as error:
            refused.add(error.key)
    assert found == refused == set(BAD)


def test_warnings(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(jpeg(size=80))
    (tmp_path / "a.png").write_bytes(jpeg(size=20))
    (tmp_path / "a.txt").write_text("caption")
    (tmp_path / "b.jpg").write_bytes(jpeg(size=40))
    (tmp_path / "c.heic").write_bytes(b"x")
    report = check_folder(tmp_path, progress=False)
    assert report.unusable == []
    assert report.warnings == {
        "short side below 64 px": ["a.png", "b.jpg"],
        "no caption": ["b.jpg"],
        "not read, unknown suffix": ["1 files .heic"],
        "same name but for the suffix, so they share a caption file": ["a.*"],
    }
    assert "short side below 10 px" not in check_folder(tmp_path, min_side=10, progress=False).warnings


def test_metadata_rows_are_checked_without_stopping(tmp_path: Path) -> None:
    for name in "abcde":
        (tmp_path / f"{name}.jpg").write_bytes(jpeg())
    Image.new("L", (88, 80), 3).save(tmp_path / "map.png")
    Image.new("L", (8, 8), 3).save(tmp_path / "small.png")
    rows = [
        {"file_name": "a.jpg", "text": "x", "label": "cat", "semantic": "map.png"},
        {"file_name": "../secret.jpg"},
        {"file_name": "a.jpg", "text": "again", "label": "cat", "semantic": "map.png"},
        {"file_name": "b.jpg", "text": "x", "semantic": "map.png"},
        {"file_name": "c.jpg", "text": "x", "label": "dog", "semantic": "small.png"},
        {"file_name": "gone.jpg", "text": "x", "label": "dog", "semantic": "map.png"},
        {"file_name": "d.jpg", "text": " ", "label": "dog", "semantic": "map.png"},
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows) + "{broken\n"
    (tmp_path / "metadata.jsonl").write_text(text)
    report = check_folder(tmp_path, progress=False)
    assert {problem.name: problem.reason.split(";")[0].split(" (")[0] for problem in report.unusable} == {
        "metadata.jsonl line 2": "file_name '../secret.jpg' leaves the folder",
        "metadata.jsonl line 8": "it is not JSON",
        "a.jpg": "it has two rows in metadata.jsonl",
        "c.jpg": "small.png is 8x8, the image 88x80",
        "gone.jpg": "no such file",
    }
    assert (report.images, report.usable) == (8, 3)
    assert report.classes == {"cat": 1, "dog": 1}
    assert report.warnings["no caption"] == ["d.jpg"]
    assert report.warnings["not in the metadata file, so not read"] == ["e.jpg"]
    plain = json.loads(json.dumps(report.as_json()))
    assert plain["usable"] == 3
    assert {"name": "gone.jpg", "reason": "no such file"} in plain["unusable"]


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        check_folder(tmp_path / "none")
    with pytest.raises(UserError, match="it holds no images"):
        check_folder(tmp_path)

"""WebDataset shards: the same samples as a folder's, in any order, and no archive that can do harm."""

from __future__ import annotations

import io
import json
import os
import pickle
import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ldm.cli.main import main
from ldm.data.check import check_folder
from ldm.data.loader import TrainingBatches
from ldm.data.sample import BadSample, Batch
from ldm.data.shard_archive import _expand, find_shards
from ldm.data.shard_index import _read, _write, build_index, open_index
from ldm.data.shards import ShardsSource
from ldm.data.sources import DataConfig, open_source
from ldm.errors import UserError

Member = tuple[str | tarfile.TarInfo, bytes]


def picture(seed: int, kind: str = "PNG", size: tuple[int, int] = (9, 7)) -> bytes:
    stream = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(stream, kind)
    return stream.getvalue()


def grey(value: int, size: tuple[int, int] = (9, 7)) -> bytes:
    stream = io.BytesIO()
    Image.new("L", size, value).save(stream, "PNG")
    return stream.getvalue()


def shard(path: Path, members: Iterable[Member], **options: int) -> Path:
    with tarfile.open(path, "w", **options) as archive:  # type: ignore[call-overload]
        for name, content in members:
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.size = len(content) if info.isreg() else 0
            archive.addfile(info, io.BytesIO(content))
    return path


def samples(first: int, count: int) -> list[Member]:
    numbers = range(first, first + count)
    return [m for i in numbers for m in ((f"{i:04d}.png", picture(i)), (f"{i:04d}.txt", f"number {i}\n".encode()))]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three shards of five samples."""
    for number in range(3):
        shard(tmp_path / f"train-{number:03d}.tar", samples(5 * number, 5))
    return tmp_path


def bad(source: ShardsSource) -> dict[str, str]:
    found = {}
    for index in range(len(source)):
        try:
            source.read(index)
        except BadSample as error:
            found[error.key] = error.reason
    return found


def test_any_sample_is_reached_at_once(folder: Path) -> None:
    source = ShardsSource(folder)
    assert len(source) == 15
    for index in (14, 0, 7):
        sample = source.read(index)
        assert sample.key == source.key(index) == f"train-{index // 5:03d}.tar/{index:04d}.png"
        assert sample.captions == (f"number {index}",)
        assert sample.image is not None
        np.testing.assert_array_equal(np.asarray(sample.image), np.asarray(Image.open(io.BytesIO(picture(index)))))
        assert source.size(index) == (9, 7)
        assert source.read(index, with_image=False).image is None


def test_all_parts(tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text("sky\nsea\nsand\nrock\n")
    told = {"caption": "of img2dataset", "url": "none", "width": 9}
    members: list[Member] = [
        ("a/x.jpg", picture(0, "JPEG")),
        ("a/x.json", json.dumps(told).encode()),
        ("a/x.semantic.png", grey(3)),
        ("a/x.mask.png", grey(255)),
        ("a/x.cls", b"2\n"),
        ("b/x.WEBP", picture(1, "WEBP")),
        ("b/x.json", json.dumps({"text": ["one", "two"]}).encode()),
        ("README.md", b"not a sample"),
        ("._x.jpg", b"what a Mac leaves"),
    ]
    shard(tmp_path / "s.tar", members)
    first, second = (ShardsSource(tmp_path).read(index) for index in (0, 1))
    assert first.captions == ("of img2dataset",) and first.extra == {"url": "none", "width": 9} and first.label == 2
    assert first.semantic is not None and first.semantic.getpixel((0, 0)) == 3
    assert first.mask is not None and first.mask.getpixel((0, 0)) == 255
    assert second.key == "s.tar/b/x.WEBP" and second.captions == ("one", "two") and second.label is None
    source = ShardsSource(tmp_path)
    assert (len(source), source.classes, source.semantic_classes) == (
        2,
        ("0", "1", "2"),
        ("sky", "sea", "sand", "rock"),
    )
    assert source.index.skipped == {".md": 1}
    assert ShardsSource(tmp_path, caption_column="url").read(0).captions == ("none",)


def test_order_and_batches_are_those_of_a_folder_with_these_samples(folder: Path, tmp_path: Path) -> None:
    loose = tmp_path / "loose"
    loose.mkdir()
    for index in range(15):
        (loose / f"{index:04d}.png").write_bytes(picture(index))
        (loose / f"{index:04d}.txt").write_text(f"number {index}\n")

    def batches(config: DataConfig, start: int = 0, workers: int = 0) -> list[Batch]:
        source = open_source(config)
        return list(
            TrainingBatches(source, config, batch_size=4, seed=1, start_step=start, end_step=6, workers=workers)
        )

    common = {"resolution": 8, "crop": "random", "flip": True}
    of_folder = batches(DataConfig(root=str(loose), **common))  # type: ignore[arg-type]
    config = DataConfig(source="shards", root=str(folder), **common)  # type: ignore[arg-type]
    whole, resumed = batches(config), batches(config, start=3, workers=1)
    for one, other in [*zip(of_folder, whole, strict=True), *zip(whole[3:], resumed, strict=True)]:
        assert one.captions == other.captions
        assert one.images is not None and other.images is not None and one.images.equal(other.images)


def test_the_index_is_made_once_and_anew_when_the_shards_or_it_change(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    first = ShardsSource(folder)
    (path,) = folder.glob(".shards-*.safetensors")
    with monkeypatch.context() as patch:
        patch.setattr("ldm.data.shard_index.build_index", None)  # any call fails
        again = ShardsSource(folder)
    assert [again.key(i) for i in range(15)] == [first.key(i) for i in range(15)]
    assert again.fingerprint == first.fingerprint and again.read(4).image == first.read(4).image
    whole = path.read_bytes()
    half, other = whole[: len(whole) // 2], whole.replace(b"offset", b"offzet")
    for damaged in (half, other, b"", b"\xff" * 100):
        path.write_bytes(damaged)
        source = ShardsSource(folder)
        assert [source.read(i).captions for i in (0, 14)] == [("number 0",), ("number 14",)]
    assert "the index is damaged" in caplog.text
    os.utime(folder / "train-001.tar", (1, 1))
    assert ShardsSource(folder).fingerprint != first.fingerprint
    assert len(list(folder.glob(".shards-*.safetensors"))) == 2
    with pytest.raises(UserError, match=r"train-001\.tar: it changed while in use"):
        first.read(7)


def test_an_index_that_points_behind_the_end_is_not_used(folder: Path) -> None:
    shards = find_shards(str(folder))
    index = open_index(shards)
    index.places["image"][1][3] = 2**31
    path = next(folder.glob(".shards-*"))
    _write(path, index)
    with pytest.raises(ValueError, match="behind the end"):
        _read(path, shards)
    assert len(open_index(shards)) == 15 and open_index(shards).places["image"][1][3] < 1000


def test_a_folder_that_cannot_be_written_to(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise UserError("read-only")

    monkeypatch.setattr("ldm.data.shard_index._write", refuse)
    assert ShardsSource(folder).read(3).captions == ("number 3",)
    assert "cannot be kept and is made at each start: read-only" in caplog.text


def test_a_pickled_source_reads_the_same(folder: Path) -> None:
    source = ShardsSource(folder)
    assert pickle.loads(pickle.dumps(source)).read(9) == source.read(9)


def linked(name: str, kind: bytes, target: str) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def test_what_is_wrong_is_named_and_the_rest_used(tmp_path: Path) -> None:
    big = tarfile.TarInfo("0/big.txt")
    members: list[Member] = [
        *samples(0, 1),
        ("text-only.txt", b"no image"),
        ("image-only.png", picture(1)),
        ("twice.jpg", picture(2, "JPEG")),
        ("twice.png", picture(2)),
        ("again.png", picture(3)),
        ("again.txt", b"one"),
        ("again.txt", b"two"),
        ("../../etc/cron.png", picture(4)),
        ("/abs.png", picture(4)),
        ("a/../b.png", picture(4)),
        (linked("link.png", tarfile.SYMTYPE, "/etc/passwd"), b""),
        (linked("hard.png", tarfile.LNKTYPE, "0000.png"), b""),
        (linked("device.png", tarfile.CHRTYPE, ""), b""),
        (linked("folder", tarfile.DIRTYPE, ""), b""),
        ("empty.png", b""),
        ("not.png", b"<html>404</html>"),
        ("gif.jpg", picture(5, "GIF")),
        ("cut.png", picture(6)[:60]),
        ("latin.png", picture(7)),
        ("latin.txt", "café".encode("latin-1")),
        ("broken.png", picture(8)),
        ("broken.json", b"{"),
        ("list.png", picture(8)),
        ("list.json", b"[1]"),
        ("deep.png", picture(8)),
        ("deep.json", b"[" * 100_000),
        ("cls.png", picture(8)),
        ("cls.cls", b"cat"),
        ("mapped.png", picture(9)),
        ("mapped.semantic.png", grey(1, (3, 3))),
        ("line\nbreak \U0001f408.png", picture(10)),
        ("0/big.png", picture(0)),
        (big, b"x" * (1 << 20) + b"x"),
    ]
    shard(tmp_path / "s.tar", members)
    source = ShardsSource(tmp_path)
    expected = {
        "text-only": "it has no image (found .txt)",
        "twice.jpg": "it is there twice (twice.png)",
        "again.png": "it is there twice (again.txt)",
        "../../etc/cron.png": "its name leaves the archive",
        "/abs.png": "its name leaves the archive",
        "a/../b.png": "its name leaves the archive",
        "link.png": "it is a link or a device",
        "hard.png": "it is a link or a device",
        "device.png": "it is a link or a device",
        "empty.png": "the file is empty",
        "not.png": "it holds text, not an image",
        "cut.png": "the file is cut short",
        "latin.png": "its caption (.txt) is no UTF-8",
        "broken.png": "its .json cannot be read",
        "list.png": "its .json holds a list",
        "deep.png": "its .json cannot be read",
        "cls.png": "its .cls holds b'cat'",
        "mapped.png": "its .semantic.png is 3x3, the image 9x7",
        "0/big.png": "big.txt has 1048577 bytes; allowed is 1048576",
    }
    found = bad(source)
    assert found.keys() == {f"s.tar/{name}" for name in expected}
    for name, reason in expected.items():
        assert found[f"s.tar/{name}"].startswith(reason), name
    good = {source.key(index) for index in range(len(source))} - found.keys()
    assert good == {f"s.tar/{name}" for name in ("0000.png", "image-only.png", "gif.jpg", "line\nbreak \U0001f408.png")}
    assert [source.read(i).captions for i in range(3) if source.key(i) == "s.tar/image-only.png"] == [("",)]
    # `ldm data check` lists the very same.
    report = check_folder(tmp_path, progress=False)
    assert {problem.name: problem.reason for problem in report.unusable} == found
    assert len(report.warnings["no caption"]) == 3
    assert [path.name for path in tmp_path.iterdir() if not path.name.startswith(".")] == ["s.tar"]


@pytest.mark.parametrize("keep", ["half a picture", "half a header", "no end"])
def test_a_truncated_archive_gives_what_is_before_the_cut(tmp_path: Path, keep: str) -> None:
    path = shard(tmp_path / "s.tar", samples(0, 4))
    with tarfile.open(path) as archive:
        last = archive.getmembers()[-2]
    cut = {"half a picture": last.offset_data + 30, "half a header": last.offset + 100, "no end": last.offset}[keep]
    os.truncate(path, cut)
    source = ShardsSource(tmp_path)
    assert [source.read(index).captions for index in range(3)] == [("number 0",), ("number 1",), ("number 2",)]
    ((key, reason),) = bad(source).items()
    assert "cut short" in reason
    assert key == ("s.tar/0003.png" if keep == "half a picture" else f"s.tar/byte {last.offset}")


def test_a_forged_size_costs_no_memory(tmp_path: Path) -> None:
    """A member, a long name and a pax header that claim gigabytes, and a size below 0, which once made tarfile hang."""
    for number, kind in enumerate((tarfile.REGTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.GNUTYPE_SPARSE)):
        for size in (1 << 40, -512, 1 << 62):
            info = tarfile.TarInfo("x.png")
            info.type = kind
            info.size = size
            header = info.tobuf(tarfile.GNU_FORMAT)
            path = tmp_path / f"{number}{size}" / "s.tar"
            path.parent.mkdir()
            whole = shard(path, samples(0, 1)).read_bytes()
            with path.open("wb") as file:
                file.write(whole[: 2 * 1024 + 512 - 512] + header + bytes(1024))
                file.truncate(1 << 32)  # a file with a hole: reading it whole would take 4 GiB
            source = ShardsSource(path.parent)
            assert source.read(0).captions == ("number 0",)
            assert 1 <= len(bad(source)) <= 2


def test_headers_in_headers_without_end(tmp_path: Path) -> None:
    info = tarfile.TarInfo("x")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 4
    whole = shard(tmp_path / "s.tar", samples(0, 1)).read_bytes()
    with tarfile.open(tmp_path / "s.tar") as archive:
        end = archive.getmembers()[-1].offset_data + 512
    chain = (info.tobuf(tarfile.GNU_FORMAT) + b"abc\0".ljust(512, b"\0")) * 5000
    (tmp_path / "s.tar").write_bytes(whole[:end] + chain + bytes(1024))
    source = ShardsSource(tmp_path)
    assert source.read(0).captions == ("number 0",)
    ((_, reason),) = bad(source).items()
    assert "broken or cut short from here on" in reason


def test_sparse_and_pax(tmp_path: Path) -> None:
    long = "directory-with-a-long-name/" * 8 + "é.png"
    pax = tarfile.TarInfo("y.png")
    pax.pax_headers = {"path": "../escape.png"}
    sparse = tarfile.TarInfo("z.png")
    sparse.pax_headers = {"GNU.sparse.size": "99", "GNU.sparse.map": "0,1", "GNU.sparse.major": "0"}
    shard(tmp_path / "s.tar", [(long, picture(0)), (pax, picture(1)), (sparse, picture(2))], format=tarfile.PAX_FORMAT)
    source = ShardsSource(tmp_path)
    assert source.key(0) == f"s.tar/{long}"
    assert source.read(0).image is not None
    assert {reason.split(";")[0] for reason in bad(source).values()} <= {
        "its name leaves the archive",
        "it is stored with holes (sparse)",
    }
    assert len(bad(source)) == 2


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_damaged_archives_are_read_or_refused(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    path = tmp_path_factory.mktemp("damaged") / "s.tar"
    whole = bytearray(shard(path, [*samples(0, 2), ("é" * 120 + ".png", picture(3))]).read_bytes())
    headers = [at for at in range(0, len(whole), 512) if whole[at + 257 : at + 262] == b"ustar"]
    for _ in range(data.draw(st.integers(1, 4))):
        block = data.draw(st.sampled_from(headers))
        at = block + data.draw(st.integers(0, 511))
        whole[at] = data.draw(st.sampled_from([0, 255, 128, ord("7"), ord("-"), ord("x"), ord("L"), ord("S")]))
        if data.draw(st.booleans()):  # a header that is whole again
            whole[block + 148 : block + 156] = b" " * 8
            total = sum(whole[block : block + 512])
            whole[block + 148 : block + 156] = f"{total:06o}\0 ".encode()
    path.write_bytes(whole)
    try:
        source = ShardsSource(path)
    except UserError as error:
        assert "\n" not in str(error)
        return
    for index in range(len(source)):
        try:
            assert source.read(index).image is not None
        except BadSample as error:
            assert error.reason


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "the file is empty"),
        (b"\x1f\x8b\x08" + bytes(600), "it is compressed"),
        (b"<html>" * 200, "it is no tar archive"),
        (os.urandom(1 << 12), "it is no tar archive"),
    ],
    ids=["empty", "gzip", "html", "noise"],
)
def test_what_is_no_archive_is_refused_by_name(folder: Path, content: bytes, says: str) -> None:
    (folder / "train-001.tar").write_bytes(content)
    with pytest.raises(UserError, match=rf"train-001\.tar: {says}"):
        ShardsSource(folder)


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("a-{0..3}", ["a-0", "a-1", "a-2", "a-3"]),
        ("{08..11}", ["08", "09", "10", "11"]),
        ("{x,y}/{0..1}", ["x/0", "x/1", "y/0", "y/1"]),
        ("plain", ["plain"]),
        ("{", ["{"]),
    ],
)
def test_patterns(pattern: str, names: Sequence[str]) -> None:
    assert _expand(pattern) == names


def test_roots(folder: Path) -> None:
    def names(root: str) -> list[str]:
        return [shard.path.name for shard in find_shards(f"{folder}/{root}")]

    everything = ["train-000.tar", "train-001.tar", "train-002.tar"]
    assert names("") == names("train-{000..002}.tar") == names("*.tar") == names("train-00?.tar") == everything
    assert names("train-001.tar") == ["train-001.tar"]
    for root, says in (
        ("train-{000..003}.tar", r"found no .*train-003\.tar"),
        ("none-*.tar", "found no"),
        ("{0..99999999}.tar", "at most a million"),
        ("none", "found no"),
    ):
        with pytest.raises(UserError, match=says) as error:
            names(root)
        assert "\n" not in str(error.value)
    (folder / "empty").mkdir()
    with pytest.raises(UserError, match=r"it holds no \.tar files"):
        names("empty")


def test_a_folder_source_of_shards_says_what_to_set(folder: Path) -> None:
    with pytest.raises(UserError, match=r"data\.source: shards"):
        open_source(DataConfig(root=str(folder), resolution=8))


def test_the_command_checks_shards(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shard(folder / "train-003.tar", [("lonely.txt", b"x")])
    assert main(["data", "check", f"{folder}/train-{{000..003}}.tar", "--min-side", "1"]) == 1
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "train-003.tar/lonely: it has no image (found .txt)"
    assert "15 of 16 images can be used, 1 cannot" in out[1]


def test_no_descriptor_stays_open(folder: Path) -> None:
    source = ShardsSource(folder)
    descriptors = Path("/proc/self/fd")
    if not descriptors.is_dir():
        pytest.skip("needs /proc")
    before = len(list(descriptors.iterdir()))
    for index in range(15):
        source.read(index)
        source.size(index)
    build_index(find_shards(str(folder)), progress=False)
    assert len(list(descriptors.iterdir())) == before

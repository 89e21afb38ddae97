"""The layouts of an image folder, and what is refused."""

from __future__ import annotations

import csv
import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ldm.data.folder import FolderSource
from ldm.data.folder_index import PackedStrings
from ldm.data.sample import BadSample
from ldm.errors import UserError


def make_image(path: Path, colour: tuple[int, int, int] = (9, 8, 7), size: tuple[int, int] = (6, 4)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


def write_jsonl(root: Path, *rows: object) -> None:
    (root / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def test_jsonl_with_everything(tmp_path: Path) -> None:
    for name in ("a.png", "sub/b.png"):
        make_image(tmp_path / name)
    Image.fromarray(np.full((4, 6), 2, dtype=np.uint8)).save(tmp_path / "a_map.png")
    Image.new("L", (6, 4), 255).save(tmp_path / "mask.png")
    row = {"semantic": "a_map.png", "mask": "mask.png"}
    write_jsonl(
        tmp_path,
        {"file_name": "sub/b.png", "text": ["ein", "zwei — ü"], "label": "dog", "scene": {"x": [1, 2]}, **row},
        {"file_name": "./a.png", "text": "one", "label": "cat", **row},
    )
    source = FolderSource(tmp_path)
    assert len(source) == 2
    assert source.classes == ("cat", "dog")
    first, second = source.read(0), source.read(1)
    assert (first.key, first.captions, first.label) == ("sub/b.png", ("ein", "zwei — ü"), 1)
    assert first.extra == {"scene": {"x": [1, 2]}}
    assert (second.key, second.captions, second.label) == ("a.png", ("one",), 0)
    assert first.image is not None
    assert first.image.getpixel((0, 0)) == (9, 8, 7)
    assert first.semantic is not None and np.asarray(first.semantic).tolist() == [[2] * 6] * 4
    assert first.mask is not None and first.mask.getpixel((0, 0)) == 255


def test_csv_with_quoted_line_breaks_and_byte_order_mark(tmp_path: Path) -> None:
    rows = [
        ["file_name", "text", "label", "artist"],
        ["a.png", 'two\nlines, "quoted" ä', "3", "me"],
        ["b.png", "plain", "0", ""],
        ["c.png", "", "1", "you"],
    ]
    with (tmp_path / "metadata.csv").open("w", encoding="utf-8-sig", newline="") as file:
        csv.writer(file).writerows(rows)
    for name in "abc":
        make_image(tmp_path / f"{name}.png")
    source = FolderSource(tmp_path)
    samples = [source.read(index) for index in (2, 0, 1)]
    assert [sample.captions for sample in samples] == [("",), ('two\nlines, "quoted" ä',), ("plain",)]
    assert [sample.label for sample in samples] == [1, 3, 0]
    assert source.classes == ("0", "1", "2", "3")
    assert [sample.extra for sample in samples] == [{"artist": "you"}, {"artist": "me"}, {}]


@given(
    st.lists(
        st.tuples(
            st.text(st.characters(codec="utf-8", exclude_characters="\0\r"), max_size=20),
            st.text("ab\n\",' ", max_size=6),
        ),
        min_size=1,
        max_size=8,
    )
)
def test_any_csv_row_is_found_again_by_its_offset(tmp_path_factory: pytest.TempPathFactory, rows: list) -> None:
    root = tmp_path_factory.mktemp("csv")
    with (root / "metadata.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file_name", "text", "other"])
        writer.writerows([f"{i}.png", text, other] for i, (text, other) in enumerate(rows))
    source = FolderSource(root)
    read = [source.read(index, with_image=False) for index in range(len(source))]
    assert [sample.captions[0] for sample in read] == [text for text, _ in rows]
    assert [sample.extra.get("other", "") for sample in read] == [other for _, other in rows]


def test_sidecar_captions(tmp_path: Path) -> None:
    for name in ("b.jpg", "a.PNG", "c.webp"):
        make_image(tmp_path / name)
    (tmp_path / "a.txt").write_text("first caption\n\n  second caption \n", encoding="utf-8")
    (tmp_path / "b.txt").write_text("\n", encoding="utf-8")
    source = FolderSource(tmp_path)
    assert [(s.key, s.captions) for s in map(source.read, range(3))] == [
        ("a.PNG", ("first caption", "second caption")),
        ("b.jpg", ("",)),
        ("c.webp", ("",)),
    ]
    assert source.classes == ()
    assert source.read(0).label is None


def test_sidecar_serves_metadata_rows_without_text(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        make_image(tmp_path / name)
    (tmp_path / "a.txt").write_text("from the file")
    write_jsonl(tmp_path, {"file_name": "a.png"}, {"file_name": "b.png", "text": "own"})
    source = FolderSource(tmp_path)
    assert [source.read(i).captions for i in range(2)] == [("from the file",), ("own",)]


def test_class_subfolders(tmp_path: Path) -> None:
    for name in ("dog/2.png", "cat/deep/1.png", "dog/1.png"):
        make_image(tmp_path / name)
    (tmp_path / "dog" / "1.txt").write_text("a good dog")
    (tmp_path / ".thumbnails").mkdir()
    make_image(tmp_path / ".thumbnails" / "x.png")
    (tmp_path / "readme.md").write_text("x")
    source = FolderSource(tmp_path)
    assert source.classes == ("cat", "dog")
    assert [(s.key, s.label, s.captions) for s in map(source.read, range(3))] == [
        ("cat/deep/1.png", 0, ("",)),
        ("dog/1.png", 1, ("a good dog",)),
        ("dog/2.png", 1, ("",)),
    ]


def test_images_beside_class_subfolders_are_refused(tmp_path: Path) -> None:
    make_image(tmp_path / "a.png")
    make_image(tmp_path / "dog" / "b.png")
    with pytest.raises(UserError, match=r"1 images \(a.png, ...\) lie beside subfolders"):
        FolderSource(tmp_path)


def test_a_link_to_the_folder_above_ends(tmp_path: Path) -> None:
    make_image(tmp_path / "dog" / "a.png")
    (tmp_path / "dog" / "loop").symlink_to(tmp_path, target_is_directory=True)
    assert len(FolderSource(tmp_path)) == 1


@pytest.mark.parametrize("column", ["file_name", "semantic", "mask"])
@pytest.mark.parametrize("path", ["../x.png", "a/../../x.png", "/etc/passwd", "..", "", 3, "a\0b"])
def test_paths_stay_inside_the_folder(tmp_path: Path, column: str, path: object) -> None:
    make_image(tmp_path / "a.png")
    write_jsonl(tmp_path, {"file_name": "a.png", "text": "", column: path})
    with pytest.raises(UserError, match=rf"metadata.jsonl line 1: {column}"):
        FolderSource(tmp_path)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"file_name": "a.png"}, {"file_name": "b.png"}, {"file_name": "./a.png"}], r"^a.png: it has two rows"),
        ([{"text": "x"}], r"line 1: file_name is missing"),
        ([{"file_name": "a.png", "text": 3}], r"line 1: text is 3"),
        ([{"file_name": "a.png", "text": ["x", None]}], r"line 1: text is"),
        ([{"file_name": "a.png", "label": -1}], r"line 1: label is -1"),
        ([{"file_name": "a.png", "label": True}], r"line 1: label is True"),
        ([{"file_name": "a.png", "label": 1.5}], r"line 1: label is 1.5"),
        (
            [{"file_name": "a.png", "label": 1}, {"file_name": "b.png", "label": "x"}],
            r"labels are names \('x'\) and num",
        ),
        ([{"file_name": "a.png", "label": 10**9}], r"found the label 1000000000"),
        (["a.png"], r"line 1: it must be an object"),
        ([{"file_name": "a.png", "caption": "x"}], r"no column 'text' .* as in caption"),
        ([], r"it holds no images"),
    ],
)
def test_metadata_that_is_refused(tmp_path: Path, rows: list[object], message: str) -> None:
    write_jsonl(tmp_path, *rows)
    with pytest.raises(UserError, match=message) as caught:
        FolderSource(tmp_path)
    assert "\n" not in str(caught.value)


def test_broken_json_and_csv_name_the_line(tmp_path: Path) -> None:
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png"}\n\n{"file_name": \n')
    with pytest.raises(UserError, match=r"metadata.jsonl line 3: it is not JSON"):
        FolderSource(tmp_path)
    (tmp_path / "metadata.csv").write_text("file_name,text\na.png,x\nb.png,y,z\n")
    with pytest.raises(UserError, match="keep one of them"):
        FolderSource(tmp_path)
    (tmp_path / "metadata.jsonl").unlink()
    with pytest.raises(UserError, match=r"metadata.csv line 3: 3 cells, the header has 2"):
        FolderSource(tmp_path)
    (tmp_path / "metadata.csv").write_bytes("file_name,text\na.png,ü\n".encode("latin-1"))
    with pytest.raises(UserError, match=r"UTF-8"):
        FolderSource(tmp_path)


def test_problems_can_be_collected_instead(tmp_path: Path) -> None:
    for name in "ab":
        make_image(tmp_path / f"{name}.png")
    write_jsonl(tmp_path, {"file_name": "a.png"}, {"file_name": "../x"}, {"file_name": "b.png"}, {"file_name": "a.png"})
    problems: list[str] = []
    source = FolderSource(tmp_path, on_problem=lambda name, reason: problems.append(name))
    assert problems == ["metadata.jsonl line 2", "a.png"]
    assert [source.key(i) for i in range(len(source))] == ["a.png", "b.png"]


def test_another_caption_column(tmp_path: Path) -> None:
    make_image(tmp_path / "a.png")
    write_jsonl(tmp_path, {"file_name": "a.png", "prompt": "x", "text": "kept"})
    sample = FolderSource(tmp_path, caption_column="prompt").read(0)
    assert (sample.captions, sample.extra) == (("x",), {"text": "kept"})
    with pytest.raises(UserError, match="no column 'titel'"):
        FolderSource(tmp_path, caption_column="titel")


@pytest.mark.parametrize("part", ["label", "semantic", "mask"])
def test_a_part_that_some_samples_lack_is_none_for_them(tmp_path: Path, part: str) -> None:
    for name in ("a.png", "b.png"):
        make_image(tmp_path / name)
    Image.new("L", (6, 4)).save(tmp_path / "map.png")
    write_jsonl(
        tmp_path,
        {"file_name": "a.png", part: "x" if part == "label" else "map.png"},
        {"file_name": "b.png", "text": ""},
    )
    source = FolderSource(tmp_path)
    assert getattr(source.read(0), part) is not None
    assert getattr(source.read(1, with_image=False), part) is None


def test_map_of_another_size_or_class_is_a_bad_sample(tmp_path: Path) -> None:
    make_image(tmp_path / "a.png")
    Image.new("L", (6, 5)).save(tmp_path / "map.png")
    write_jsonl(tmp_path, {"file_name": "a.png", "semantic": "map.png"})
    with pytest.raises(BadSample, match=r"a.png: map.png is 6x5, the image 6x4"):
        FolderSource(tmp_path).read(0)
    Image.new("L", (6, 4), 2).save(tmp_path / "map.png")
    (tmp_path / "classes.txt").write_text("sky\nsea\n")
    source = FolderSource(tmp_path)
    assert source.semantic_classes == ("sky", "sea")
    with pytest.raises(BadSample, match=r"has class 2; classes.txt names 0 to 1, and 255 is unknown"):
        source.read(0)
    Image.new("L", (6, 4), 255).save(tmp_path / "map.png")
    assert source.read(0).semantic is not None
    (tmp_path / "map.png").unlink()
    with pytest.raises(BadSample, match=r"a.png: map.png: no such file"):
        source.read(0)


def test_without_image_the_file_is_not_opened(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"nothing")
    write_jsonl(tmp_path, {"file_name": "a.png", "text": "still here"})
    sample = FolderSource(tmp_path).read(0, with_image=False)
    assert (sample.image, sample.captions) == (None, ("still here",))


@pytest.mark.parametrize("metadata", [True, False])
def test_fingerprint_changes_with_the_data(tmp_path: Path, metadata: bool) -> None:
    for name in ("a.png", "b.png"):
        make_image(tmp_path / name)
    if metadata:
        write_jsonl(tmp_path, {"file_name": "a.png"}, {"file_name": "b.png"})
    prints = [FolderSource(tmp_path).fingerprint]
    assert FolderSource(tmp_path).fingerprint == prints[0]
    os.utime(tmp_path / "a.png", ns=(1, 1))
    prints.append(FolderSource(tmp_path).fingerprint)
    make_image(tmp_path / "a.png", size=(60, 40))
    os.utime(tmp_path / "a.png", ns=(1, 1))
    prints.append(FolderSource(tmp_path).fingerprint)
    (tmp_path / "b.png").rename(tmp_path / "c.png")
    prints.append(FolderSource(tmp_path).fingerprint)
    assert len(set(prints)) == 4


def test_pickled_source_reads_the_same(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        make_image(tmp_path / name, (1, 2, 3))
    write_jsonl(tmp_path, {"file_name": "a.png", "text": "x"}, {"file_name": "b.png", "text": "y"})
    copy = pickle.loads(pickle.dumps(FolderSource(tmp_path)))
    assert copy.read(1).captions == ("y",)


def test_metadata_that_changes_in_use_is_noticed(tmp_path: Path) -> None:
    make_image(tmp_path / "a.png")
    write_jsonl(tmp_path, {"file_name": "a.png", "text": "x"})
    source = FolderSource(tmp_path)
    write_jsonl(tmp_path, {"file_name": "a.png", "text": "longer"})
    with pytest.raises(UserError, match="it changed while in use"):
        source.read(0)


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        FolderSource(tmp_path / "none")


@given(st.lists(st.text(st.characters(codec="utf-8"), max_size=8)))
def test_packed_strings_are_a_list(strings: list[str]) -> None:
    packed = PackedStrings(strings)
    assert [packed[i] for i in range(len(packed))] == strings

"""Hugging Face datasets from local files: same samples in every storage form, no network, no needless decoding."""

from __future__ import annotations

import io
import pickle
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ldm.data.huggingface import HuggingFaceSource
from ldm.data.sample import BadSample
from ldm.data.sources import DataConfig, open_source
from ldm.errors import UserError

datasets = pytest.importorskip("datasets")


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*args: Any, **options: Any) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def colour(index: int) -> tuple[int, int, int]:
    return (40 * index, 10, 200)


def png(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def make_dataset(images: list[bytes] | None = None, **columns: Any) -> Any:
    images = images or [png(Image.new("RGB", (6, 4), colour(index))) for index in range(4)]
    values = {
        "image": [{"bytes": image, "path": None} for image in images],
        "text": [["one", "two"] if index == 1 else f"caption {index}" for index in range(len(images))],
        **columns,
    }
    if "text" in columns or len(images) > 1:
        values["text"] = columns.get("text", [[text] if isinstance(text, str) else text for text in values["text"]])
    features = {name: datasets.Image() for name in ("image", "map", "mask") if name in values}
    dataset = datasets.Dataset.from_dict(values)
    for name, feature in features.items():
        dataset = dataset.cast_column(name, feature)
    return dataset


def saved(dataset: Any, form: str, root: Path) -> str:
    if form == "parquet":
        dataset.to_parquet(root / "data.parquet")
        return str(root / "data.parquet")
    if form == "parquet folder":
        (root / "folder" / "data").mkdir(parents=True)
        dataset.to_parquet(root / "folder" / "data" / "train-00000-of-00001.parquet")
        dataset.select([0]).to_parquet(root / "folder" / "data" / "test-00000-of-00001.parquet")
        return str(root / "folder")
    if form == "saved":
        dataset.save_to_disk(root / "saved")
        return str(root / "saved")
    if form == "saved splits":
        datasets.DatasetDict({"train": dataset, "test": dataset.select([0])}).save_to_disk(root / "splits")
        return str(root / "splits")
    dataset.save_to_disk(root / "saved")
    (arrow,) = (root / "saved").glob("*.arrow")
    return str(arrow)


@pytest.mark.parametrize("form", ["parquet", "parquet folder", "saved", "saved splits", "arrow"])
def test_every_local_form_gives_the_same_samples(form: str, tmp_path: Path) -> None:
    root = saved(make_dataset(artist=["a", "b", "c", "d"]), form, tmp_path)
    source = open_source(DataConfig(source="huggingface", root=root))
    assert len(source) == 4
    for index in range(4):
        sample = source.read(index)
        assert sample.key == f"train/{index}"
        assert sample.captions == (("one", "two") if index == 1 else (f"caption {index}",))
        assert sample.extra == {"artist": "abcd"[index]}
        assert sample.image is not None
        assert (sample.image.size, sample.image.getpixel((0, 0))) == ((6, 4), colour(index))
        assert source.size(index) == (6, 4)
        assert (sample.semantic, sample.mask, sample.label) == (None, None, None)
    assert source.classes == ()
    again = open_source(DataConfig(source="huggingface", root=root))
    assert again.fingerprint == source.fingerprint
    copy = pickle.loads(pickle.dumps(source))
    assert copy.read(2).captions == ("caption 2",)


def test_other_splits_and_fingerprints(tmp_path: Path) -> None:
    root = saved(make_dataset(), "saved splits", tmp_path)
    train, test = HuggingFaceSource(root), HuggingFaceSource(root, split="test")
    assert (len(train), len(test)) == (4, 1)
    assert train.fingerprint != test.fingerprint
    with pytest.raises(UserError, match=r"split 'nope'"):
        HuggingFaceSource(root, split="nope")


def test_named_columns_maps_masks_and_class_labels(tmp_path: Path) -> None:
    maps = [png(Image.fromarray(np.full((4, 6), i, dtype=np.uint8))) for i in range(4)]
    dataset = make_dataset(
        label=[1, 0, 1, 1],
        map=[{"bytes": file, "path": None} for file in maps],
        mask=[{"bytes": png(Image.new("L", (6, 4), 255)), "path": None}] * 4,
    )
    dataset = dataset.cast_column("label", datasets.ClassLabel(names=["zebra", "ant"]))
    dataset = dataset.rename_columns({"image": "picture", "text": "words"})
    root = saved(dataset, "parquet", tmp_path)
    source = HuggingFaceSource(
        root,
        image_column="picture",
        caption_column="words",
        label_column="label",
        semantic_column="map",
        mask_column="mask",
    )
    assert source.classes == ("zebra", "ant")
    sample = source.read(3)
    assert (sample.label, sample.captions) == (1, ("caption 3",))
    assert sample.semantic is not None and np.asarray(sample.semantic).tolist() == [[3] * 6] * 4
    assert sample.mask is not None and sample.mask.getpixel((0, 0)) == 255
    assert sample.extra == {}


@pytest.mark.parametrize(
    ("values", "classes", "labels"),
    [(["b", "a", "b", "a"], ("a", "b"), [1, 0, 1, 0]), ([2, 0, 0, 2], ("0", "1", "2"), [2, 0, 0, 2])],
)
def test_labels_without_class_names(tmp_path: Path, values: list, classes: tuple, labels: list[int]) -> None:
    source = HuggingFaceSource(saved(make_dataset(label=values), "saved", tmp_path), label_column="label")
    assert source.classes == classes
    assert [source.read(i, with_image=False).label for i in range(4)] == labels


def test_without_image_nothing_of_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = HuggingFaceSource(saved(make_dataset(images=[b"not an image"] * 4), "saved", tmp_path))
    sample = source.read(0, with_image=False)
    assert (sample.image, sample.captions, sample.extra) == (None, ("caption 0",), {})
    with pytest.raises(BadSample, match="train/0: it holds text") as caught:
        source.read(0)
    assert caught.value.key == "train/0"


def test_missing_parts_are_none_and_wrong_ones_bad_samples(tmp_path: Path) -> None:
    dataset = make_dataset(label=["x", None, "x", "x"], text=["a", None, "c", "d"])
    source = HuggingFaceSource(saved(dataset, "saved", tmp_path), label_column="label")
    assert source.read(1, with_image=False).label is None
    plain = HuggingFaceSource(source.root)
    assert plain.read(1).captions == ("",)
    wrong = HuggingFaceSource(source.root, mask_column="label")
    assert wrong.read(1).mask is None
    with pytest.raises(BadSample, match="train/0: its mask"):
        wrong.read(0)


def test_exif_and_alpha_follow_our_rules(tmp_path: Path) -> None:
    stream = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGBA", (6, 4), (0, 0, 0, 0)).save(stream, "PNG", exif=exif)
    source = HuggingFaceSource(saved(make_dataset(images=[stream.getvalue()] * 4), "parquet", tmp_path))
    image = source.read(0).image
    assert image is not None
    assert (image.size, image.getpixel((0, 0))) == ((4, 6), (255, 255, 255))
    assert source.size(0) == (4, 6)


def test_wrong_input_is_one_line(tmp_path: Path) -> None:
    root = saved(make_dataset(), "parquet", tmp_path)
    for options, message in (
        ({"caption_column": "caption"}, r"^data\.caption_column: found 'caption'; .* has the columns image, text;"),
        ({"image_column": "img"}, r"^data\.image_column: found 'img'"),
        ({"label_column": "label"}, r"^data\.label_column: found 'label'"),
    ):
        with pytest.raises(UserError, match=message):
            HuggingFaceSource(root, **options)
    (tmp_path / "x.zip").touch()
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 no")
    (tmp_path / "empty").mkdir()
    for name in ("x.zip", "broken.parquet", "empty"):
        with pytest.raises(UserError) as caught:
            HuggingFaceSource(str(tmp_path / name))
        assert "\n" not in str(caught.value)
    for name in ("./no/such", "/no/such", "a/b/c", "~/nothing here"):
        with pytest.raises(UserError, match="no such file or folder"):
            HuggingFaceSource(name)


def test_without_the_package_the_way_out_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"pip install 'ldm\[data\]'"):
        HuggingFaceSource("anything")


def test_open_source_needs_a_root() -> None:
    for source in ("folder", "huggingface"):
        with pytest.raises(UserError, match=r"^data\.root: found nothing"):
            open_source(DataConfig(source=source))  # type: ignore[arg-type]


def test_open_source_opens_scenes_and_folders(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    assert open_source(DataConfig(root=str(tmp_path))).read(0).key == "a.png"
    scenes = open_source(DataConfig(source="scenes", resolution=16))
    image = scenes.read(0).image
    assert image is not None
    assert image.size == (16, 16)

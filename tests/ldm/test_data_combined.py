"""Several folders as one: repeats, weights, and names that mean the same in all of them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ldm import config
from ldm.data.combined import CombinedSource, Part, distinct, distinct_index, distinct_indices, distinct_length
from ldm.data.folder import FolderSource
from ldm.data.loader import TrainingBatches, Wanted
from ldm.data.naming import renumbering
from ldm.data.sample import BadSample, Batch, Sample
from ldm.data.sources import DataConfig, DataFolder, open_source
from ldm.errors import UserError
from ldm.training.stage1 import Stage1Config


@dataclass(frozen=True)
class Pictures:
    """Image i is all red value 10 * i; what it shows has the name of the source's class i, and so has its map."""

    name: str
    length: int = 3
    classes: tuple[str, ...] = ()
    semantic_classes: tuple[str, ...] = ()
    maps: bool = False
    bad: frozenset[int] = frozenset()

    @property
    def fingerprint(self) -> str:
        return self.name

    def __len__(self) -> int:
        return self.length

    def size(self, index: int) -> tuple[int, int]:
        return 8 + index, 8

    def read(self, index: int, *, with_image: bool = True) -> Sample:
        if index in self.bad:
            raise BadSample(f"{index}", "broken")
        classes = np.full((8, 8), index, dtype=np.uint8)
        classes[0] = 255
        return Sample(
            key=f"{index}",
            image=Image.new("RGB", (8, 8), (10 * index, 0, 0)) if with_image else None,
            captions=(f"{self.name} {index}",),
            semantic=Image.fromarray(classes) if self.maps else None,
            label=index if self.classes else None,
        )


def epoch_of(source: Any, batch_size: int = 1, wanted: Wanted | None = None, epoch: int = 0) -> list[Batch]:
    data = DataConfig(root="unused", resolution=8)
    steps = len(source) // batch_size
    given_ = {"batch_size": batch_size, "seed": 1, "start_step": epoch * steps, "end_step": (epoch + 1) * steps}
    return list(TrainingBatches(source, data, wanted=wanted or Wanted(), **given_))  # type: ignore[arg-type]


PARTS = st.lists(st.tuples(st.integers(1, 6), st.integers(1, 4)), min_size=1, max_size=4)


@settings(deadline=None, max_examples=30)
@given(parts=PARTS, epoch=st.integers(0, 2))
def test_a_sample_comes_as_often_in_an_epoch_as_its_part_says(parts: list[tuple[int, int]], epoch: int) -> None:
    source = CombinedSource([Part(Pictures(f"p{n}", length), repeats) for n, (length, repeats) in enumerate(parts)])
    assert len(source) == sum(length * repeats for length, repeats in parts)
    found = Counter(batch.captions[0] for batch in epoch_of(source, epoch=epoch))
    assert found == {f"p{n} {i}": repeats for n, (length, repeats) in enumerate(parts) for i in range(length)}


@settings(deadline=None)
@given(parts=PARTS, outer=st.integers(1, 3), count=st.integers(1, 3))
def test_distinct_samples_are_the_same_samples(parts: list[tuple[int, int]], outer: int, count: int) -> None:
    """Also where a combination is part of a combination, as with class images beside several folders."""
    inner = CombinedSource([Part(Pictures(f"p{n}", length), repeats) for n, (length, repeats) in enumerate(parts)])
    source = CombinedSource([Part(Pictures("first", count), 2), Part(inner, outer)])
    once = distinct(source)
    assert len(once) == distinct_length(source) == distinct_length(once) == count + sum(n for n, _ in parts)
    found = [distinct_index(source, index) for index in range(len(source))]
    assert found == distinct_indices(source).tolist()
    assert set(found) == set(range(len(once)))
    for index, other in enumerate(found):
        assert source.read(index).captions == once.read(other).captions
        assert source.read(index).key == once.read(other).key
        assert source.size(index) == once.size(other)
    assert len({once.read(index).key for index in range(len(once))}) == len(once)


def test_weights_arrive_in_the_batch_and_are_none_where_all_are_one() -> None:
    source = CombinedSource([Part(Pictures("a"), weight=0.5), Part(Pictures("b"))])
    (batch,) = epoch_of(source, batch_size=6)
    assert batch.weights is not None and batch.weights.dtype == torch.float32
    expected = {"a": 0.5, "b": 1.0}
    assert batch.weights.tolist() == [expected[caption[0]] for caption in batch.captions]
    assert batch.to("meta").weights.is_meta  # type: ignore[union-attr]
    (equal,) = epoch_of(CombinedSource([Part(Pictures("a")), Part(Pictures("b"))]), batch_size=6)
    assert equal.weights is None and equal.to("meta").weights is None
    nested = CombinedSource([Part(source, weight=3.0)])
    assert {nested.read(index).weight for index in range(6)} == {1.5, 3.0}
    assert {distinct(nested).read(index).weight for index in range(6)} == {1.0}


def test_weights_are_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    (batch,) = epoch_of(CombinedSource([Part(Pictures("a"), weight=0.5)]), batch_size=3)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor.clone())
    pinned = batch.pin_memory()
    assert pinned.weights is not batch.weights and torch.equal(pinned.weights, batch.weights)  # type: ignore[arg-type]


def test_labels_and_classes_of_maps_are_joined_by_name() -> None:
    first = Pictures("a", 2, classes=("cat", "dog"), semantic_classes=("sky", "road"), maps=True)
    second = Pictures("b", 3, classes=("emu", "dog", "ant"), semantic_classes=("road", "tree", "sky"), maps=True)
    source = CombinedSource([Part(first), Part(second, repeats=2), Part(Pictures("c", 1))])
    assert source.classes == ("cat", "dog", "emu", "ant")
    assert source.semantic_classes == ("sky", "road", "tree")
    names = [first.classes[0], first.classes[1], *second.classes, *second.classes]
    assert [source.classes[source.read(index).label] for index in range(8)] == names  # type: ignore[index]
    assert source.read(8).label is None
    shown = ["sky", "road", *(("road", "tree", "sky") * 2)]
    for index, name in enumerate(shown):
        semantic = np.asarray(source.read(index).semantic)
        assert set(semantic[0]) == {255}
        assert {source.semantic_classes[number] for number in semantic[1:].flat} == {name}
    wanted = Wanted(semantic_classes=3, label_classes=4)
    (batch,) = epoch_of(source, batch_size=9, wanted=wanted)
    assert batch.labels is not None and batch.semantic is not None
    assert sorted(batch.labels.tolist()) == [-1, 0, 1, 1, 1, 2, 2, 3, 3]
    assert (batch.semantic[batch.labels == -1] == 255).all()


def test_what_the_other_side_does_not_name_is_unknown() -> None:
    source = Pictures("a", 2, classes=("cat", "dog"), semantic_classes=("sky", "road"), maps=True)
    to = renumbering(source, ["dog"], ["road"])
    assert [to(source.read(index)).label for index in range(2)] == [None, 0]
    assert [np.asarray(to(source.read(index)).semantic)[1, 1] for index in range(2)] == [255, 0]
    same = renumbering(source, source.classes, source.semantic_classes)
    assert (same.labels, same.semantic) == (None, None)


def test_maps_without_names_beside_maps_with_names_are_told() -> None:
    source = CombinedSource([Part(Pictures("a", semantic_classes=("sky",))), Part(Pictures("b", maps=True))])
    with pytest.raises(BadSample, match=r"^part 1/0: its semantic map's classes have no names .*; add classes\.txt"):
        source.read(3)
    assert CombinedSource([Part(Pictures("b", maps=True))]).read(0).semantic is not None


def test_more_classes_than_a_map_can_hold() -> None:
    parts = [Part(Pictures(name, semantic_classes=tuple(f"{name}{n}" for n in range(200)))) for name in "ab"]
    with pytest.raises(UserError, match=r"^data: found 400 classes .*; allowed is 255; "):
        CombinedSource(parts)


def test_the_fingerprint_covers_parts_repeats_and_weights() -> None:
    a, b = Pictures("a"), Pictures("b")
    sources = [
        [Part(a), Part(b)],
        [Part(b), Part(a)],
        [Part(a)],
        [Part(a, repeats=2), Part(b)],
        [Part(a, weight=0.5), Part(b)],
        [Part(a), Part(replace(b, name="c"))],
    ]
    assert len({CombinedSource(parts).fingerprint for parts in sources}) == len(sources)
    assert CombinedSource(sources[0]).fingerprint == CombinedSource(sources[0]).fingerprint
    # What is computed once per sample does not depend on how often it comes.
    assert len({distinct(CombinedSource(sources[n])).fingerprint for n in (0, 3, 4)}) == 1


@pytest.mark.parametrize(("repeats", "weight", "field"), [(0, 1.0, "repeats"), (1, 0.0, "weight"), (1, -1.0, "weight")])
def test_repeats_and_weights_that_are_none(repeats: int, weight: float, field: str) -> None:
    with pytest.raises(ValueError, match=rf"^{field}: found .*; allowed is .*; leave the folder out"):
        Part(Pictures("a"), repeats, weight)
    with pytest.raises(ValueError, match=rf"^{field}: found .*; allowed is .*; leave the folder out"):
        DataFolder(root="a", repeats=repeats, weight=weight)


def test_outside_and_nothing() -> None:
    source = CombinedSource([Part(Pictures("a"), repeats=2)])
    for index in (-1, 6):
        with pytest.raises(IndexError):
            source.read(index)
    with pytest.raises(UserError, match="no sources"):
        CombinedSource([])


# --- Folders ---------------------------------------------------------------------------------------------------------


def folder(root: Path, names: Sequence[str], caption: str = "") -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 9)).save(root / name)
        if caption:
            (root / name).with_suffix(".txt").write_text(caption)
    return root


def build(**values: object) -> DataConfig:
    return config.build(DataConfig, values, "data")


def test_folders_of_the_config(tmp_path: Path) -> None:
    one, two = folder(tmp_path / "one", ["a.png"], "mine"), folder(tmp_path / "two", ["a.png", "b.png"], "other")
    source = open_source(build(folders=[{"root": str(one), "repeats": 5, "weight": 2.0}, {"root": str(two)}]))
    samples = [source.read(index) for index in range(len(source))]
    assert [sample.captions for sample in samples] == [("mine",)] * 5 + [("other",)] * 2
    assert [sample.weight for sample in samples] == [2.0] * 5 + [1.0] * 2
    assert [sample.key for sample in samples[4:]] == [f"{one}/a.png", f"{two}/a.png", f"{two}/b.png"]
    (two / "b.png").write_bytes(b"")
    with pytest.raises(BadSample) as caught:
        source.read(6)
    assert str(caught.value) == f"{two}/b.png: the file is empty"
    with pytest.raises(BadSample, match=r"two/b\.png: the file is empty"):
        source.size(6)


def test_a_combination_in_a_combination_keeps_the_names_of_its_folders(tmp_path: Path) -> None:
    one, two = (FolderSource(folder(tmp_path / name, ["a.png"])) for name in ("one", "two"))
    source = CombinedSource([Part(CombinedSource([Part(one), Part(two)])), Part(Pictures("c"))])
    assert [source.read(index).key for index in range(3)] == [f"{one.root}/a.png", f"{two.root}/a.png", "part 1/0"]
    with pytest.raises(UserError, match=r"^data: found one folder twice"):
        CombinedSource([Part(CombinedSource([Part(one), Part(two)])), Part(one)])


def test_class_subfolders_of_several_folders_are_joined(tmp_path: Path) -> None:
    one, two = (
        folder(tmp_path / "one", ["cat/a.png", "dog/a.png"]),
        folder(tmp_path / "two", ["ant/a.png", "dog/b.png"]),
    )
    source = open_source(build(folders=[{"root": str(one)}, {"root": str(two)}]))
    assert source.classes == ("cat", "dog", "ant")
    assert [source.read(index).label for index in range(4)] == [0, 1, 2, 1]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"root": "a", "folders": [{"root": "b"}]}, r"^data\.root: found 'a' beside folders; .*; set the other null$"),
        ({"source": "huggingface", "folders": [{"root": "b"}]}, r"^data\.folders: found with source huggingface"),
        ({"folders": []}, r"^data\.folders: found an empty list"),
        ({"folders": [{"repeats": 2}]}, r"^data\.folders\[0\]\.root: missing"),
        ({"folders": [{"root": "a"}, {"root": "b", "repeats": 0}]}, r"^data\.folders\[1\]\.repeats: found 0"),
        ({"folders": [{"root": "a", "repeat": 2}]}, r"^data\.folders\[0\]\.repeat: unknown key; did you mean"),
        ({"folders": ["a"]}, r"^data\.folders\[0\]: found 'a'"),
        ({"root": "a", "buckets": {"step": 3}}, r"^data\.buckets\.step: found 3"),
        ({"root": "a", "resolution": 100, "buckets": {}}, r"^data\.resolution: found 100 with buckets of step 64"),
    ],
)
def test_what_the_config_refuses(values: dict, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        build(**values)
    assert "\n" not in str(caught.value)


def test_a_folder_that_is_missing_or_named_twice(tmp_path: Path) -> None:
    one = folder(tmp_path / "one", ["a.png"])
    with pytest.raises(UserError, match="no such folder"):
        open_source(build(folders=[{"root": str(one)}, {"root": str(tmp_path / "two")}]))
    with pytest.raises(UserError, match=r"^data: found one folder twice in .*; give it once, with repeats$"):
        open_source(build(folders=[{"root": str(one)}, {"root": f"{one}/"}]))


def test_the_root_can_still_be_set_on_the_command_line(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps({"folders": [{"root": "a", "repeats": 2}]}))
    loaded = config.load(DataConfig, path)
    assert loaded.folders == (DataFolder(root="a", repeats=2),)
    assert config.load(DataConfig, path, ["folders=null", "root=b"]).root == "b"
    dumped = tmp_path / "again.yaml"
    dumped.write_text(config.dump(loaded))
    assert config.load(DataConfig, dumped) == loaded
    with pytest.raises(UserError, match=r"^root: found 'b' beside folders"):
        config.load(DataConfig, path, ["root=b"])


def test_stage_1_has_no_weights_and_says_so() -> None:
    values = {"out": "x", "training": {"steps": 1, "batch_size": 1}, "discriminator": {"weight": 0}}
    folders = [{"root": "a", "repeats": 2}, {"root": "b", "weight": 0.5}]
    with pytest.raises(UserError, match=r"^data\.folders: found weight 0\.5 in stage 1, .*; use repeats instead$"):
        config.build(Stage1Config, {**values, "data": {"folders": folders}})
    assert config.build(Stage1Config, {**values, "data": {"folders": folders[:1]}}).data.folders is not None

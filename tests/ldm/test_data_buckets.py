"""Which shapes there are, which image goes where, and in which order batches of one shape come."""

from __future__ import annotations

import math
import pickle
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ldm.data.bucket_index import assign, open_buckets
from ldm.data.buckets import Buckets, BucketsConfig, bucket_sizes, nearest, nearest_size
from ldm.data.combined import CombinedSource, Part
from ldm.data.folder import FolderSource
from ldm.data.loader import TrainingBatches
from ldm.data.order import BucketOrder
from ldm.data.sample import BadSample, Batch, Sample
from ldm.data.share import Share
from ldm.data.sources import DataConfig
from ldm.errors import UserError

SMALL = BucketsConfig(step=8, max_aspect=2.0)
CONFIG = DataConfig(root="unused", resolution=24, buckets=SMALL, flip=True, crop="random")
SHAPES = ((16, 32), (24, 24), (32, 16))
assert bucket_sizes(24, SMALL) == SHAPES


@dataclass(frozen=True)
class Pictures:
    """Image i has size `sizes[i]` and the red value i; the headers in `unreadable` and pixels in `bad` are broken."""

    sizes: tuple[tuple[int, int], ...]
    bad: frozenset[int] = frozenset()
    unreadable: frozenset[int] = frozenset()
    fingerprint: str = "pictures"
    classes: tuple[str, ...] = ()
    semantic_classes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.sizes)

    def size(self, index: int) -> tuple[int, int]:
        if index in self.unreadable:
            raise BadSample(f"key {index}", "no header")
        return self.sizes[index]

    def read(self, index: int, *, with_image: bool = True) -> Sample:
        if index in self.bad | self.unreadable:
            raise BadSample(f"key {index}", "it is bad")
        image = Image.new("RGB", self.sizes[index], (index, 0, 0)) if with_image else None
        return Sample(f"key {index}", image, tuple(f"{index} {number}" for number in range(3)))


MIXED = Pictures(((20, 30), (30, 20), (25, 25), (60, 20), (10, 11), (9, 90)) * 4 + ((40, 20),))
"""Tall, wide, square, wide, square, tall, four times each, and one more wide one."""


def opened(folder: Path, source: Any, config: DataConfig = CONFIG) -> Buckets:
    buckets = open_buckets(folder, source, config, 8, Share())
    assert buckets is not None
    return buckets


# --- Shapes ----------------------------------------------------------------------------------------------------------


def test_the_shapes_of_stable_diffusion_are_those_of_the_usual_construction() -> None:
    assert bucket_sizes(512, BucketsConfig()) == ((384, 640), (448, 576), (512, 512), (576, 448), (640, 384))
    # Some of those that SDXL was trained with (appendix I of arXiv 2307.01952).
    sdxl = {(704, 1408), (768, 1344), (832, 1216), (896, 1152), (1024, 1024), (1152, 896), (1216, 832), (1344, 768)}
    assert sdxl <= set(bucket_sizes(1024, BucketsConfig()))


@settings(deadline=None)
@given(st.integers(1, 12), st.sampled_from([8, 24, 64]), st.floats(1.01, 5))
def test_shapes_against_brute_force(multiple: int, step: int, max_aspect: float) -> None:
    area, config = (multiple * step) ** 2, BucketsConfig(step=step, max_aspect=max_aspect)
    sides = range(step, area // step + 1, step)
    fits = [(width, height) for width in sides for height in sides if width * height <= area]
    tallest: dict[int, int] = {}
    for width, height in fits:
        tallest[width] = max(height, tallest.get(width, 0))
    expected = {
        (width, height)
        for width, height in fits
        if height == tallest[width] or width == tallest[height]  # what fits one way fits the other way
        if max(width, height) <= max_aspect * min(width, height)
    }
    found = bucket_sizes(multiple * step, config)
    assert set(found) == expected
    aspects = [width / height for width, height in found]
    assert aspects == sorted(set(aspects))
    assert (multiple * step, multiple * step) in found


@given(
    st.lists(st.tuples(st.integers(1, 5000), st.integers(1, 5000)), min_size=1, max_size=20),
    st.sampled_from([(512, 64, 2.0), (256, 8, 4.0), (64, 64, 2.0)]),
)
def test_every_image_goes_to_the_shape_nearest_to_its_own(sizes: list[tuple[int, int]], shape: tuple) -> None:
    buckets = bucket_sizes(shape[0], BucketsConfig(step=shape[1], max_aspect=shape[2]))

    def distance(size: tuple[int, int], bucket: tuple[int, int]) -> float:
        return abs(math.log(size[0] / size[1]) - math.log(bucket[0] / bucket[1]))

    for size, bucket in zip(sizes, nearest(np.array(sizes), buckets).tolist(), strict=True):
        assert distance(size, buckets[bucket]) <= min(distance(size, other) for other in buckets) + 1e-12
        assert nearest_size(size, buckets) == buckets[bucket]


def test_unreadable_images_go_to_the_fullest_bucket_and_nothing_but_such_is_refused() -> None:
    sizes = np.array([[0, 0], [20, 30], [32, 16], [30, 15], [0, 0]])
    assert nearest(sizes, SHAPES).tolist() == [-1, 0, 2, 2, -1]
    assert assign(sizes, SHAPES).tolist() == [2, 0, 2, 2, 2]
    with pytest.raises(UserError, match="none of 3 images can be read"):
        assign(np.zeros((3, 2)), SHAPES)


# --- The index -------------------------------------------------------------------------------------------------------


def test_the_index_holds_every_sample_in_its_bucket(tmp_path: Path) -> None:
    buckets = opened(tmp_path / "index", MIXED)
    assert buckets.sizes == SHAPES
    assert [buckets.count(bucket) for bucket in range(3)] == [8, 8, 9]
    members = [buckets.index(place) for place in range(len(buckets))]
    assert members == buckets.indices(0, 25).tolist()
    assert sorted(members) == list(range(25))
    for place, index in enumerate(members):
        assert buckets.sizes[buckets.bucket_of(place)] == nearest_size(MIXED.sizes[index], SHAPES)
    assert buckets.summary(9).endswith("; fewer than a batch of 9, so repeated within it: 16x32: 8, 24x24: 8")
    assert buckets.summary(8) == "buckets (width x height: images): 16x32: 8, 24x24: 8, 32x16: 9"


def test_empty_buckets_are_left_out(tmp_path: Path) -> None:
    buckets = opened(tmp_path, Pictures(((9, 9), (18, 9))))
    assert buckets.sizes == ((24, 24), (32, 16))
    assert [buckets.index(place) for place in range(2)] == [0, 1]


def test_headers_are_read_once_and_the_index_follows_the_data(tmp_path: Path) -> None:
    """Sizes are kept for the data, whatever the shapes; other data has files of its own."""
    opened(tmp_path, MIXED)

    class Unasked(Pictures):
        def size(self, index: int) -> tuple[int, int]:
            raise AssertionError("the header must not be read again")

    again = Unasked(MIXED.sizes)
    assert opened(tmp_path, again).count(2) == 9
    wider = DataConfig(root="unused", resolution=24, buckets=BucketsConfig(step=8, max_aspect=8.0))
    assert len(opened(tmp_path, again, wider).sizes) > 3
    other = opened(tmp_path, Pictures(((9, 9),) * 3, fingerprint="other"))
    assert (len(other), other.sizes) == (3, ((24, 24),))
    assert len(list(tmp_path.glob("sizes-*"))) == 2
    assert not list(tmp_path.glob(".*"))


def test_a_broken_index_is_named(tmp_path: Path) -> None:
    opened(tmp_path, MIXED)
    (path,) = tmp_path.glob("sizes-*")
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(UserError, match=r"sizes-.*\.npy: delete it") as caught:
        opened(tmp_path, MIXED)
    assert "\n" not in str(caught.value)


def test_repeated_samples_are_counted_as_often_but_measured_once(tmp_path: Path) -> None:
    tall, wide = Pictures(((10, 20),) * 3, fingerprint="a"), Pictures(((20, 10), (10, 10)), fingerprint="b")
    source = CombinedSource([Part(tall, repeats=2), Part(wide, repeats=3)])
    buckets = opened(tmp_path, source)
    assert [buckets.count(bucket) for bucket in range(3)] == [6, 3, 3]
    assert buckets.indices(6, 9).tolist() == [7, 9, 11]  # the squares
    (sizes,) = tmp_path.glob("sizes-*")
    assert np.load(sizes).tolist() == [[10, 20]] * 3 + [[20, 10], [10, 10]]


def test_an_index_travels_to_workers_without_its_pages(tmp_path: Path) -> None:
    buckets = opened(tmp_path, MIXED)
    assert buckets.index(3) == 11
    sent = pickle.dumps(buckets)
    assert len(sent) < 1000
    assert pickle.loads(sent).index(3) == 11


def test_a_folder_of_files_with_turned_and_broken_ones(tmp_path: Path) -> None:
    root = tmp_path / "images"
    root.mkdir()
    Image.new("RGB", (20, 10)).save(root / "a.png")
    turned = Image.Exif()
    turned[274] = 6
    Image.new("RGB", (20, 10)).save(root / "b.jpg", exif=turned)
    (root / "c.png").write_bytes(b"nothing")
    Image.new("RGB", (20, 11)).save(root / "d.png")
    buckets = opened(tmp_path / "index", FolderSource(root))
    assert buckets.sizes == ((16, 32), (32, 16))
    assert buckets.indices(0, 4).tolist() == [1, 0, 2, 3]


def test_a_step_that_the_autoencoder_cannot_halve_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^data\.buckets\.step: found 8; .* 16 x 16 pixels.*; set 16$"):
        open_buckets(tmp_path, MIXED, CONFIG, 16, Share())
    assert open_buckets(tmp_path, MIXED, DataConfig(root="unused"), 16, Share()) is None
    assert not list(tmp_path.iterdir())


# --- The order -------------------------------------------------------------------------------------------------------

COUNTS = st.lists(st.integers(1, 30), min_size=1, max_size=4)


def order_of(counts: list[int], batch_size: int, seed: int = 0) -> BucketOrder:
    """Buckets of so many samples; the sample at place p is p."""
    return BucketOrder(Buckets([(8, 8 * n) for n in range(1, len(counts) + 1)], counts), batch_size, seed)


@settings(deadline=None)
@given(counts=COUNTS, batch_size=st.integers(1, 12), seed=st.integers(0, 99), epoch=st.integers(0, 2))
def test_an_epoch_visits_every_sample_in_batches_of_one_bucket(
    counts: list[int], batch_size: int, seed: int, epoch: int
) -> None:
    order = order_of(counts, batch_size, seed)
    assert order.steps_per_epoch == sum(math.ceil(count / batch_size) for count in counts)
    seen: Counter[int] = Counter()
    for step in range(epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch):
        found = [order.sample_at(step, position) for position in range(batch_size)]
        assert {at for at, _ in found} == {epoch}
        buckets = {order.buckets.bucket_of(index) for _, index in found}
        assert {order.buckets.sizes[bucket] for bucket in buckets} == {order.size_at(step)}
        (bucket,) = buckets
        # No sample twice in a batch, but in a bucket that is too small: there all come about equally often.
        times = Counter(index for _, index in found)
        assert max(times.values()) == math.ceil(batch_size / counts[bucket])
        seen.update(times)
    assert set(seen) == set(range(sum(counts)))
    for bucket, count in enumerate(counts):
        times_each = [seen[index] for index in range(order.buckets.starts[bucket], order.buckets.starts[bucket + 1])]
        assert sum(times_each) == math.ceil(count / batch_size) * batch_size
        assert max(times_each) <= min(times_each) + 1


def test_epochs_and_seeds_have_orders_of_their_own_and_buckets_are_mixed() -> None:
    def shapes(seed: int, epoch: int) -> tuple:
        order = order_of([40, 40], 4, seed)
        return tuple(order.size_at(epoch * order.steps_per_epoch + step) for step in range(order.steps_per_epoch))

    def filled_up(epoch: int) -> frozenset[int]:
        order = order_of([10], 4)
        seen = Counter(order.sample_at(3 * epoch + step, place)[1] for step in range(3) for place in range(4))
        return frozenset(index for index, times in seen.items() if times == 2)

    found = {shapes(seed, epoch) for seed in range(3) for epoch in range(3)}
    assert len(found) == 9
    assert all(order != tuple(sorted(order)) for order in found)
    assert len({filled_up(epoch) for epoch in range(8)}) > 4  # not always the same samples come twice


@given(counts=COUNTS, step=st.integers(0, 40), seed=st.integers(0, 9))
def test_stand_ins_are_of_the_bucket_first(counts: list[int], step: int, seed: int) -> None:
    order = order_of(counts, 4, seed)
    epoch, index = order.sample_at(step, 0)
    bucket = order.buckets.bucket_of(index)
    own = set(range(order.buckets.starts[bucket], order.buckets.starts[bucket + 1]))
    first = {order.replacement_for(step, index, epoch, attempt) for attempt in range(len(own))}
    assert first == own
    later = {order.replacement_for(step, index, epoch, attempt) for attempt in range(len(own), len(own) + 9)}
    assert later <= set(range(sum(counts)))
    cached = BucketOrder(order.buckets, 4, seed, one_shape_each=True)
    assert {cached.replacement_for(step, index, epoch, attempt) for attempt in range(2 * len(own))} == own


# --- Batches ---------------------------------------------------------------------------------------------------------


def batches(source: Any, buckets: Buckets, **options: Any) -> list[Batch]:
    given_: dict[str, Any] = {"batch_size": 12, "seed": 3, "start_step": 0, "end_step": 7, "buckets": buckets}
    return list(TrainingBatches(source, CONFIG, **(given_ | options)))


def assert_same(one: Batch, other: Batch) -> None:
    for name in ("keys", "positions", "captions", "bad"):
        assert getattr(one, name) == getattr(other, name)
    assert one.images is not None and other.images is not None
    assert torch.equal(one.images, other.images)


def joined(parts: list[Batch]) -> Batch:
    def words(name: str) -> tuple:
        return tuple(word for part in parts for word in getattr(part, name))

    names = ("keys", "positions", "captions", "bad")
    return Batch(**{name: words(name) for name in names}, images=torch.cat([p.images for p in parts]))  # type: ignore[misc]


def test_batches_hold_the_samples_of_the_order_in_its_shape(tmp_path: Path) -> None:
    buckets = opened(tmp_path, MIXED)
    order = BucketOrder(buckets, 12, 3)
    shapes = set()
    for step, batch in enumerate(batches(MIXED, buckets)):
        width, height = order.size_at(step)
        assert batch.images is not None and batch.images.shape == (12, 3, height, width)
        expected = [order.sample_at(step, position)[1] for position in range(12)]
        assert batch.keys == tuple(f"key {index}" for index in expected)
        assert ((batch.images[:, 0, 0, 0] + 1) * 127.5).round().int().tolist() == expected
        shapes.add((width, height))
    assert shapes == set(SHAPES)


@pytest.mark.parametrize(("world", "accumulation"), [(1, 2), (2, 1), (2, 3), (4, 1), (1, 12)])
def test_processes_and_accumulation_change_nothing(tmp_path: Path, world: int, accumulation: int) -> None:
    buckets = opened(tmp_path, MIXED)
    ranks = [batches(MIXED, buckets, world_size=world, rank=rank, accumulation=accumulation) for rank in range(world)]
    for step, whole in enumerate(batches(MIXED, buckets)):
        parts = [ranks[rank][step * accumulation + a] for a in range(accumulation) for rank in range(world)]
        assert_same(joined(parts), whole)


def test_workers_change_nothing(tmp_path: Path) -> None:
    buckets = opened(tmp_path, MIXED)
    for one, other in zip(batches(MIXED, buckets), batches(MIXED, buckets, workers=2), strict=True):
        assert_same(one, other)


@settings(max_examples=10, deadline=None)
@given(start=st.integers(0, 9), seed=st.integers(0, 9))
def test_a_later_start_gives_the_rest(tmp_path_factory: pytest.TempPathFactory, start: int, seed: int) -> None:
    buckets = opened(tmp_path_factory.mktemp("index"), MIXED)
    whole = batches(MIXED, buckets, end_step=9, seed=seed)
    rest = batches(MIXED, buckets, start_step=start, end_step=9, seed=seed)
    for one, other in zip(whole[start:], rest, strict=True):
        assert_same(one, other)


def test_bad_samples_are_replaced_by_others_of_any_shape_if_need_be(tmp_path: Path) -> None:
    """The only tall image is broken: its batches are of other images, cut tall."""
    source = Pictures(((10, 20),) + ((20, 10),) * 6, bad=frozenset({0, 3}), unreadable=frozenset({2}))
    buckets = opened(tmp_path, source)
    assert [buckets.count(bucket) for bucket in range(2)] == [1, 6]
    found = batches(source, buckets, batch_size=4, end_step=6)
    assert {batch.images.shape[-2:] for batch in found if batch.images is not None} == {(32, 16), (16, 32)}
    reported = {pair for batch in found for pair in batch.bad}
    assert reported == {(f"key {index}", "it is bad") for index in (0, 2, 3)}
    assert not {key for batch in found for key in batch.keys} & {"key 0", "key 2", "key 3"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"step": 4}, r"^step: found 4; allowed is 8 or more; "),
        ({"max_aspect": 1.0}, r"^max_aspect: found 1\.0; allowed is above 1; "),
        ({"max_aspect": math.inf}, r"^max_aspect: found inf; "),
    ],
)
def test_the_config_checks_itself(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BucketsConfig(**options)


def test_resolution_and_source_must_fit_the_buckets() -> None:
    with pytest.raises(ValueError, match=r"^resolution: found 500 with buckets of step 64; .*; set 448, or another"):
        DataConfig(root="x", resolution=500, buckets=BucketsConfig())
    with pytest.raises(ValueError, match=r"^buckets: found with source scenes"):
        DataConfig(source="scenes", resolution=64, buckets=BucketsConfig())

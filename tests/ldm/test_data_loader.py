"""Batches are a pure function of (seed, step, position), whatever the workers, processes and accumulation."""

from __future__ import annotations

import multiprocessing
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ldm.data.loader import TrainingBatches, dead_worker_told
from ldm.data.order import SquareOrder
from ldm.data.sample import BadSample, Batch, Sample
from ldm.data.sources import DataConfig
from ldm.errors import UserError

CONFIG = DataConfig(resolution=8, crop="random", flip=True)
ORDER = SquareOrder(23, 12, 3, 8)
"""That of `batches` unless told otherwise."""


@dataclass(frozen=True)
class Numbers:
    """Sample i is an image whose red value is i, of three captions; those in `bad` cannot be read."""

    length: int = 23
    bad: frozenset[int] = frozenset()
    semantic: frozenset[int] = frozenset()
    labels: bool = False
    says_threads: bool = False
    classes: tuple[str, ...] = ()
    semantic_classes: tuple[str, ...] = ()
    fingerprint: str = ""

    def __len__(self) -> int:
        return self.length

    def read(self, index: int, *, with_image: bool = True) -> Sample:
        if index in self.bad:
            raise BadSample(f"key {index}", "it is bad")
        pixels = np.zeros((8, 12, 3), dtype=np.uint8)
        pixels[..., 0], pixels[..., 1] = index, np.arange(12)
        captions = tuple(f"{index} {i}" for i in range(3))
        return Sample(
            key=f"key {index}",
            image=Image.fromarray(pixels) if with_image else None,
            captions=(f"{torch.get_num_threads()}",) if self.says_threads else captions,
            semantic=Image.fromarray(pixels[..., 1]) if index in self.semantic else None,
            label=index % 5 if self.labels else None,
        )


def batches(source: Numbers, config: DataConfig = CONFIG, **options: Any) -> list[Batch]:
    settings_: dict[str, Any] = {"batch_size": 12, "seed": 3, "start_step": 0, "end_step": 4}
    return list(TrainingBatches(source, config, **(settings_ | options)))


def assert_same(one: Batch, other: Batch) -> None:
    for name in ("keys", "positions", "captions", "bad"):
        assert getattr(one, name) == getattr(other, name)
    for name in ("images", "semantic", "masks", "labels"):
        first, second = getattr(one, name), getattr(other, name)
        assert (first is None) == (second is None)
        assert first is None or torch.equal(first, second)
    if one.moments is not None:
        assert other.moments is not None
        assert all(torch.equal(*pair) for pair in zip(one.moments, other.moments, strict=True))


def join(parts: list[Batch]) -> Batch:
    """Micro-batches of one step as one batch, in the order of the positions."""

    def tensors(name: str) -> torch.Tensor | None:
        found = [getattr(part, name) for part in parts]
        return None if found[0] is None else torch.cat(found)

    def words(name: str) -> tuple:
        return tuple(word for part in parts for word in getattr(part, name))

    return Batch(
        **{name: words(name) for name in ("keys", "positions", "captions", "bad")},
        **{name: tensors(name) for name in ("images", "semantic", "masks", "labels")},
    )


SOURCE = Numbers(bad=frozenset({2, 7, 11}), semantic=frozenset(range(23)), labels=True)


def test_one_batch_is_what_it_should_be() -> None:
    source = replace(SOURCE, bad=frozenset())
    for step, batch in enumerate(batches(source)):
        expected = [ORDER.sample_at(step, position)[1] for position in range(12)]
        assert batch.positions == tuple(range(12))
        assert batch.keys == tuple(f"key {index}" for index in expected)
        assert [int(caption.split()[0]) for caption in batch.captions] == expected
        assert batch.images is not None and batch.semantic is not None and batch.labels is not None
        assert batch.images.shape == (12, 3, 8, 8)
        assert batch.images.dtype == torch.float32
        assert ((batch.images[:, 0, 0, 0] + 1) * 127.5).round().int().tolist() == expected
        assert batch.semantic.shape == (12, 8, 8)
        assert torch.equal(((batch.images[:, 1] + 1) * 127.5).round().long(), batch.semantic)  # same crop and flip
        assert batch.labels.tolist() == [index % 5 for index in expected]
        assert batch.masks is None and batch.moments is None and batch.bad == ()


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(workers: int) -> None:
    for one, other in zip(batches(SOURCE), batches(SOURCE, workers=workers), strict=True):
        assert_same(one, other)


@pytest.mark.parametrize(("world", "accumulation"), [(1, 2), (2, 1), (2, 3), (3, 2), (4, 1), (12, 1), (1, 12)])
def test_processes_and_accumulation_change_nothing(world: int, accumulation: int) -> None:
    ranks = [batches(SOURCE, world_size=world, rank=rank, accumulation=accumulation) for rank in range(world)]
    for step, whole in enumerate(batches(SOURCE)):
        parts = [ranks[rank][step * accumulation + a] for a in range(accumulation) for rank in range(world)]
        assert {len(part) for part in parts} == {12 // (world * accumulation)}
        assert_same(join(parts), whole)


@settings(max_examples=20, deadline=None)
@given(start=st.integers(0, 6), accumulation=st.sampled_from([1, 2, 4]))
def test_a_later_start_gives_the_rest(start: int, accumulation: int) -> None:
    whole = batches(SOURCE, end_step=6, accumulation=accumulation)
    rest = batches(SOURCE, start_step=start, end_step=6, accumulation=accumulation)
    assert len(rest) == len(whole[start * accumulation :])
    for one, other in zip(whole[start * accumulation :], rest, strict=True):
        assert_same(one, other)


def test_an_iteration_can_be_repeated_and_has_a_length() -> None:
    loader = TrainingBatches(SOURCE, CONFIG, batch_size=12, seed=0, start_step=1, end_step=4, accumulation=2, workers=1)
    assert len(loader) == 6
    for one, other in zip(list(loader), list(loader), strict=True):
        assert_same(one, other)
    assert batches(SOURCE, start_step=4, end_step=4) == []
    assert batches(SOURCE, start_step=9, end_step=4) == []


def test_the_global_generator_is_left_alone() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    batches(SOURCE, workers=1)
    assert torch.equal(torch.get_rng_state(), before)


def test_captions_crops_and_flips_vary_between_epochs() -> None:
    found = batches(Numbers(length=1), batch_size=1, end_step=60)
    assert {batch.captions[0] for batch in found} == {"0 0", "0 1", "0 2"}
    firsts = {
        (round(float(b.images[0, 1, 0, 0] + 1) * 127.5), round(float(b.images[0, 1, 0, 7] + 1) * 127.5)) for b in found
    }  # type: ignore[index]
    assert firsts == {(left, left + 7) for left in range(5)} | {(left + 7, left) for left in range(5)}


def test_bad_samples_are_replaced_and_reported() -> None:
    found = batches(SOURCE, end_step=23)  # twelve epochs
    reported = [pair for batch in found for pair in batch.bad]
    assert set(reported) == {(f"key {index}", "it is bad") for index in SOURCE.bad}
    assert len(reported) >= 12 * 3  # each of them comes up once an epoch, and some as stand-ins
    assert all(key not in {f"key {i}" for i in SOURCE.bad} for batch in found for key in batch.keys)
    stand_ins = {
        batch.keys[position]
        for step, batch in enumerate(found)
        for position in range(12)
        if ORDER.sample_at(step, position)[1] in SOURCE.bad
    }
    assert len(stand_ins) > 8  # not always the same one


def test_bad_samples_leave_the_others_as_they_were() -> None:
    clean = replace(SOURCE, bad=frozenset())
    for step, (one, other) in enumerate(zip(batches(SOURCE), batches(clean), strict=True)):
        for position in range(12):
            if ORDER.sample_at(step, position)[1] not in SOURCE.bad:
                assert one.keys[position] == other.keys[position]
                assert one.images is not None and other.images is not None
                assert torch.equal(one.images[position], other.images[position])


@pytest.mark.parametrize("workers", [0, 1])
def test_nothing_but_bad_samples_stops_with_one_line(workers: int) -> None:
    with pytest.raises(
        UserError, match=r"^data: 20 samples in a row cannot be used \(first key \d+: it is bad\)"
    ) as caught:
        batches(Numbers(bad=frozenset(range(23))), workers=workers)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_map_that_a_sample_lacks_is_unknown_everywhere(workers: int) -> None:
    found = 0
    for batch in batches(Numbers(semantic=frozenset({1, 2})), workers=workers):
        if batch.semantic is None:  # neither sample is among these
            continue
        for key, semantic in zip(batch.keys, batch.semantic, strict=True):
            known = key in ("key 1", "key 2")
            assert bool((semantic == 255).all()) is not known
            found += known
    assert found > 0


@pytest.mark.parametrize(
    ("options", "advice"),
    [({"world_size": 5}, "set 10"), ({"accumulation": 24}, "set 24"), ({"batch_size": 0}, "set 1")],
)
def test_batch_sizes_that_cannot_be_split(options: dict, advice: str) -> None:
    with pytest.raises(UserError, match=rf"^batch_size: found .*; allowed is a multiple of \d+; {advice}$"):
        batches(SOURCE, **options)


class Moments:
    """Mean = (index, flipped), as a cache would hold them."""

    def __init__(self, supports_flip: bool = True, bad: frozenset[int] = frozenset()) -> None:
        self.supports_flip = supports_flip
        self.bad = bad

    def read(self, index: int, flipped: bool) -> tuple[np.ndarray, np.ndarray]:
        if index in self.bad:
            raise BadSample(f"key {index}", "no latents")
        mean = np.array([index, flipped], dtype=np.float16).reshape(2, 1, 1)
        return mean, np.full_like(mean, -3)


@dataclass(frozen=True)
class NumbersWithoutImages(Numbers):
    def read(self, index: int, *, with_image: bool = True) -> Sample:
        assert not with_image, "the image must not be decoded"
        return super().read(index, with_image=False)


@pytest.mark.parametrize("workers", [0, 2])
def test_moments_replace_images_with_the_same_samples_captions_and_flips(workers: int) -> None:
    config = DataConfig(resolution=8, flip=True)
    source = NumbersWithoutImages(semantic=frozenset(range(23)))
    cached = batches(source, config, reader=Moments(), workers=workers)
    for one, other in zip(cached, batches(Numbers(semantic=source.semantic), config), strict=True):
        assert (one.keys, one.captions, one.images) == (other.keys, other.captions, None)
        assert one.moments is not None and other.images is not None
        assert one.semantic is not None and other.semantic is not None
        mean, logvar = one.moments
        assert mean.dtype == logvar.dtype == torch.float32
        assert mean[:, 0, 0, 0].int().tolist() == [int(key.split()[1]) for key in one.keys]
        flipped = other.images[:, 1, 0, 0] > other.images[:, 1, 0, 7]
        assert torch.equal(mean[:, 1, 0, 0].bool(), flipped)
        assert 0 < flipped.sum() < 12
        assert torch.equal(one.semantic, other.semantic)
        assert (logvar == -3).all()


def test_an_image_missing_in_the_cache_is_replaced() -> None:
    found = batches(Numbers(), DataConfig(resolution=8), reader=Moments(bad=frozenset({4})))
    assert {pair for batch in found for pair in batch.bad} == {("key 4", "no latents")}
    assert all("key 4" not in batch.keys for batch in found)


def test_a_cache_that_cannot_serve_the_config_is_refused() -> None:
    with pytest.raises(UserError, match=r"^data\.crop: found random with a latent cache"):
        batches(SOURCE, CONFIG, reader=Moments())
    with pytest.raises(UserError, match=r"^data\.flip: found true with a latent cache"):
        batches(SOURCE, DataConfig(resolution=8, flip=True), reader=Moments(supports_flip=False))
    assert batches(SOURCE, DataConfig(resolution=8), reader=Moments(supports_flip=False))


def test_workers_use_one_thread() -> None:
    found = batches(Numbers(says_threads=True), workers=1)
    assert {caption for batch in found for caption in batch.captions} == {"1"}


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc and sigwaitinfo")
def test_workers_leak_no_file_handles_and_obey_only_their_parent(tmp_path: Any) -> None:
    """A scheduler's SIGTERM reaches the workers too; training still gets its batches to finish the step and save."""
    from ldm.data.folder import FolderSource

    for index in range(16):
        Image.new("RGB", (9, 9)).save(tmp_path / f"{index}.png")
    (tmp_path / "metadata.jsonl").write_text("".join(f'{{"file_name": "{i}.png"}}\n' for i in range(16)))
    loader = TrainingBatches(
        FolderSource(tmp_path), CONFIG, batch_size=8, seed=0, start_step=0, end_step=51, workers=1, prefetch=1
    )
    iterator = iter(loader)
    next(iterator)
    (worker,) = multiprocessing.active_children()
    subprocess.run(["kill", "-TERM", str(worker.pid)], check=True)
    for _ in range(50):
        next(iterator)
    assert worker.is_alive()
    assert worker.pid is not None
    names = [str(link.readlink()) for link in Path(f"/proc/{worker.pid}/fd").iterdir() if link.is_symlink()]
    assert [name for name in names if str(tmp_path) in name] == []
    iterator.close()
    del iterator
    worker.terminate()
    deadline = time.monotonic() + 10
    while worker.is_alive() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not worker.is_alive()


def test_a_worker_that_died_is_one_line_and_other_errors_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real thing is in tests/end_to_end/test_failure.py, in a process of its own: torch raises from SIGCHLD."""
    handled: list[object] = []
    monkeypatch.setattr("ldm.data.loader.signal.signal", lambda *arguments: handled.append(arguments))
    message = r"has died \(DataLoader worker .*Killed\.\): .*lower training\.workers"
    with pytest.raises(UserError, match=message), dead_worker_told():
        raise RuntimeError("DataLoader worker (pid 17) is killed by signal: Killed. ")
    assert handled == [(signal.SIGCHLD, signal.SIG_DFL)]
    with pytest.raises(RuntimeError, match="something else"), dead_worker_told():
        raise RuntimeError("something else")


def test_batch_to_keeps_everything() -> None:
    batch = batches(SOURCE, end_step=1)[0]
    moved = batch.to("meta")
    assert moved.images is not None and moved.images.is_meta
    assert moved.labels is not None and moved.labels.is_meta
    assert (moved.keys, moved.captions, moved.bad, moved.masks) == (batch.keys, batch.captions, batch.bad, None)
    assert batch.images is not None and not batch.images.is_meta
    assert len(batch) == 12

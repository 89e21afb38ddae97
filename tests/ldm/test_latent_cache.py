"""What the cache gives is what the autoencoder would; anything that does not match is refused by name."""

from __future__ import annotations

import dataclasses
import json
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from autoencoder.latents import encode
from autoencoder.model import AutoencoderConfig, build_autoencoder
from ldm.data.bucket_index import open_buckets
from ldm.data.buckets import BucketsConfig
from ldm.data.combined import CombinedSource, Part, distinct_index
from ldm.data.latent_cache import CacheConfig, LatentCache, cached_latents
from ldm.data.latent_encoding import build_cache
from ldm.data.latent_rows import expected_header
from ldm.data.loader import TrainingBatches
from ldm.data.sample import BadSample, Sample
from ldm.data.share import Share
from ldm.data.sources import DataConfig
from ldm.data.transforms import Geometry, apply_geometry, size_for
from ldm.errors import UserError

CONFIG = DataConfig(source="folder", root="unused", resolution=16, flip=True)
BUILD = CacheConfig(batch_size=3, workers=0)


@dataclasses.dataclass
class Pictures:
    """Random pictures of 24 x 20; some cannot be read."""

    length: int = 7
    bad: tuple[int, ...] = ()
    fingerprint: str = "pictures"
    classes: tuple[str, ...] = ()
    semantic_classes: tuple[str, ...] = ()
    reads: list[int] = dataclasses.field(default_factory=list)

    def __len__(self) -> int:
        return self.length

    def read(self, index: int, *, with_image: bool = True) -> Sample:
        self.reads.append(index)
        if index in self.bad:
            raise BadSample(f"{index}.png", "truncated")
        pixels = np.random.default_rng(index).integers(0, 256, (20, 24, 3), dtype=np.uint8)
        return Sample(key=f"{index}.png", image=Image.fromarray(pixels), captions=("a",))


@pytest.fixture(scope="module")
def autoencoder():
    return build(0)


def build(seed, kind="kl"):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = AutoencoderConfig(
            kind=kind, channels=(8, 8), latent_channels=3, layers_per_block=1, norm_groups=4, mid_attention=False
        )
        return build_autoencoder(config).eval().requires_grad_(False)


def make(tmp_path, autoencoder, source=None, config=CONFIG, **share):
    source = source or Pictures()
    return cached_latents(tmp_path / "latents", source, config, autoencoder, BUILD, Share(**share))


@pytest.mark.parametrize("kind", ["kl", "vq"])
def test_moments_are_those_of_the_autoencoder_to_fp16(tmp_path, kind):
    source, autoencoder = Pictures(), build(0, kind)
    cache = make(tmp_path, autoencoder, source)
    for index in range(len(source)):
        image = apply_geometry(source.read(index), (16, 16), Geometry()).image
        for flipped in (False, True):
            wanted = encode(autoencoder, (image.flip(-1) if flipped else image)[None])
            mean, logvar = cache.read(index, flipped)
            assert mean.dtype == logvar.dtype == torch.float32
            assert mean.shape == (3, 8, 8)
            torch.testing.assert_close(mean, wanted.mean[0], rtol=2**-10, atol=1e-5)
            torch.testing.assert_close(logvar, wanted.logvar[0], rtol=2**-10, atol=1e-5)


def test_a_mirrored_image_has_moments_of_its_own(tmp_path, autoencoder):
    """Convolutions are not symmetric: mirroring the latent would be another thing."""
    cache = make(tmp_path, autoencoder)
    plain, mirrored = cache.read(0, False)[0], cache.read(0, True)[0]
    assert not torch.allclose(plain.flip(-1), mirrored, atol=1e-2)


def test_without_flips_half_the_room(tmp_path, autoencoder):
    cache = make(tmp_path, autoencoder, config=dataclasses.replace(CONFIG, flip=False))
    assert not cache.supports_flip
    assert (cache.folder / "moments.f16").stat().st_size == 7 * 2 * 3 * 8 * 8 * 2
    assert cache.read(6, False)[0].shape == (3, 8, 8)


def test_bad_samples_are_written_down_and_raised_again(tmp_path, autoencoder):
    cache = make(tmp_path, autoencoder, Pictures(bad=(0, 4)))
    for index in range(7):
        if index in (0, 4):
            with pytest.raises(BadSample) as caught:
                cache.read(index, False)
            assert (caught.value.key, caught.value.reason) == (f"{index}.png", "truncated")
        else:
            assert cache.read(index, False)[0].abs().sum() > 0


def test_no_usable_image_is_a_user_error_that_leaves_nothing(tmp_path, autoencoder):
    with pytest.raises(UserError, match="none of 3 images can be read"):
        make(tmp_path, autoencoder, Pictures(length=3, bad=(0, 1, 2)))
    assert list(tmp_path.iterdir()) == []


def test_a_finished_cache_is_used_and_not_built_again(tmp_path, autoencoder):
    make(tmp_path, autoencoder)
    source = Pictures()
    cache = make(tmp_path, autoencoder, source)
    cache.read(3, True)
    assert source.reads == []


def test_what_a_killed_process_left_is_no_cache(tmp_path, autoencoder):
    left = tmp_path / ".latents.partial"
    left.mkdir()
    (left / "bad-9.json").write_text("[[0, 'old', 'old']]", encoding="utf-8")
    make(tmp_path, autoencoder).read(0, False)
    assert [path.name for path in tmp_path.iterdir()] == ["latents"]


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("autoencoder", {"autoencoder": 1}),
        ("data", {"source": Pictures(fingerprint="other pictures")}),
        ("images", {"source": Pictures(length=8)}),
        ("transform", {"config": dataclasses.replace(CONFIG, resolution=32)}),
        ("flips", {"config": dataclasses.replace(CONFIG, flip=False)}),
    ],
)
def test_a_stale_cache_is_refused_by_name(tmp_path, autoencoder, name, changes):
    make(tmp_path, autoencoder)
    before = (tmp_path / "latents" / "moments.f16").read_bytes()
    other = build(1) if "autoencoder" in changes else autoencoder
    with pytest.raises(UserError, match=f"made with {name} = ") as caught:
        make(tmp_path, other, changes.get("source"), changes.get("config", CONFIG))
    assert "\n" not in str(caught.value)
    assert (tmp_path / "latents" / "moments.f16").read_bytes() == before


def test_another_format_is_refused(tmp_path, autoencoder):
    header = make(tmp_path, autoencoder).folder / "header.json"
    header.write_text(json.dumps({**json.loads(header.read_text()), "format": 0}), encoding="utf-8")
    with pytest.raises(UserError, match="made with format = 0, this run has 1"):
        make(tmp_path, autoencoder)


@pytest.mark.parametrize("damage", ["cut", "gone", "header"])
def test_a_damaged_cache_is_refused(tmp_path, autoencoder, damage):
    folder = make(tmp_path, autoencoder).folder
    moments = folder / "moments.f16"
    if damage == "cut":
        moments.write_bytes(moments.read_bytes()[:-2])
    elif damage == "gone":
        moments.unlink()
    else:
        (folder / "header.json").write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match="latent cache") as caught:
        make(tmp_path, autoencoder)
    assert "\n" not in str(caught.value)


def test_a_cache_travels_to_workers_without_its_pages(tmp_path, autoencoder):
    cache = make(tmp_path, autoencoder)
    expected = cache.read(5, True)
    sent = pickle.dumps(cache)
    assert len(sent) < 2000
    assert all(torch.equal(a, b) for a, b in zip(pickle.loads(sent).read(5, True), expected, strict=True))


def test_several_processes_fill_the_same_cache(tmp_path, autoencoder):
    """The parts one after the other: each writes its rows, the first one gathers the list of bad samples."""
    source = Pictures(bad=(1, 5))
    one = CacheConfig(batch_size=1, workers=0)  # the last bit depends on how many images are encoded at once
    alone = cached_latents(tmp_path / "alone", source, CONFIG, autoencoder, one, Share())
    folder = tmp_path / "together"

    def rest() -> None:
        """At the first process's second barrier, all others have done theirs."""
        waits.append(None)
        if len(waits) == 2:
            for rank in (1, 2):
                build_cache(folder, source, CONFIG, autoencoder, one, Share(rank, 3))

    waits: list[None] = []
    build_cache(folder, source, CONFIG, autoencoder, one, Share(0, 3, rest))
    assert (folder / "moments.f16").read_bytes() == (alone.folder / "moments.f16").read_bytes()
    headers = [json.loads((path / "header.json").read_text()) for path in (folder, alone.folder)]
    assert headers[0] == headers[1]
    assert LatentCache(folder, headers[0]).supports_flip


def test_the_header_names_all_that_decides_the_moments(autoencoder):
    header = expected_header(Pictures(), CONFIG, autoencoder)
    assert header["transform"] == {"resolution": 16, "crop": "center"}
    assert header.keys() == {"format", "autoencoder", "data", "images", "transform", "flips"}


# --- Buckets and repeats ---------------------------------------------------------------------------------------------

BUCKETS = dataclasses.replace(CONFIG, resolution=24, buckets=BucketsConfig(step=8))
SIZES = [(20, 30), (30, 20), (25, 25), (60, 20), (10, 11), (9, 90), (44, 22)]
"""Of 16 x 32, 32 x 16 and 24 x 24: two tall ones, three wide ones, two squares."""


class Shapes(Pictures):
    """The pictures in sizes of their own."""

    def size(self, index: int) -> tuple[int, int]:
        return SIZES[index]

    def read(self, index: int, *, with_image: bool = True) -> Sample:
        sample = super().read(index)
        return dataclasses.replace(sample, image=sample.image.resize(SIZES[index]) if with_image else None)


def assert_as_encoded(cache, source, autoencoder):
    for index in range(len(source)):
        sample = source.read(index)
        image = apply_geometry(sample, size_for(sample, BUCKETS), Geometry()).image
        for flipped in (False, True):
            wanted = encode(autoencoder, (image.flip(-1) if flipped else image)[None])
            mean, logvar = cache.read(index, flipped)
            assert mean.shape == (3, image.shape[1] // 2, image.shape[2] // 2)
            torch.testing.assert_close(mean, wanted.mean[0], rtol=2**-10, atol=1e-5)
            torch.testing.assert_close(logvar, wanted.logvar[0], rtol=2**-10, atol=1e-5)


def test_moments_of_every_shape_are_those_of_the_autoencoder(tmp_path, autoencoder):
    source = Shapes()
    cache = make(tmp_path, autoencoder, source, BUCKETS)
    assert_as_encoded(cache, source, autoencoder)
    header = json.loads((cache.folder / "header.json").read_text())
    assert header["transform"]["buckets"] == [[16, 32, 2], [24, 24, 2], [32, 16, 3]]
    sent = pickle.dumps(cache)
    assert len(sent) < 2000
    assert all(torch.equal(a, b) for a, b in zip(pickle.loads(sent).read(5, True), cache.read(5, True), strict=True))
    before = list(source.reads)
    assert_as_encoded(make(tmp_path, autoencoder, source, BUCKETS), Shapes(), autoencoder)
    assert source.reads == before  # found, not built again


def test_bad_images_in_buckets(tmp_path, autoencoder):
    cache = make(tmp_path, autoencoder, Shapes(bad=(3,)), BUCKETS)
    with pytest.raises(BadSample, match=r"3\.png: truncated"):
        cache.read(3, False)
    assert cache.read(6, False)[0].shape == (3, 8, 16)


def test_a_bucket_without_one_good_image_is_told_before_training(tmp_path, autoencoder):
    message = r"none of 2 images of the bucket 16x32 can be read \(first 0\.png: truncated\); mend or remove them"
    with pytest.raises(UserError, match=message):
        make(tmp_path, autoencoder, Shapes(bad=(0, 5, 3)), BUCKETS)
    assert [path.name for path in tmp_path.iterdir()] == ["latents-buckets"]


def test_buckets_filled_by_several_processes(tmp_path, autoencoder):
    source, one = Shapes(bad=(1,)), CacheConfig(batch_size=1, workers=0)
    alone = cached_latents(tmp_path / "alone", source, BUCKETS, autoencoder, one, Share())
    folder, waits = tmp_path / "together", []
    buckets = open_buckets(tmp_path / "index", source, BUCKETS, 2, Share())

    def rest() -> None:
        waits.append(None)
        if len(waits) == 2:
            for rank in (1, 2):
                build_cache(folder, source, BUCKETS, autoencoder, one, Share(rank, 3), buckets)

    build_cache(folder, source, BUCKETS, autoencoder, one, Share(0, 3, rest), buckets)
    for name in ("moments.f16", "offsets.i64", "header.json"):
        assert (folder / name).read_bytes() == (alone.folder / name).read_bytes()


@pytest.mark.parametrize(
    "config",
    [
        dataclasses.replace(BUCKETS, buckets=None),
        dataclasses.replace(BUCKETS, buckets=BucketsConfig(step=8, max_aspect=9.5)),
    ],
)
def test_a_cache_of_other_shapes_is_refused_by_name(tmp_path, autoencoder, config):
    make(tmp_path, autoencoder, Shapes(), BUCKETS)
    with pytest.raises(UserError, match=r"made with transform = .*\[16, 32, 2\].*, this run has ") as caught:
        make(tmp_path, autoencoder, Shapes(), config)
    assert "\n" not in str(caught.value)


def test_lost_offsets_are_told(tmp_path, autoencoder):
    cache = make(tmp_path, autoencoder, Shapes(), BUCKETS)
    (cache.folder / "offsets.i64").write_bytes(b"12345678")
    with pytest.raises(UserError, match=r"found 8 bytes in offsets\.i64, expected 56"):
        make(tmp_path, autoencoder, Shapes(), BUCKETS)


def test_a_cache_from_before_there_were_buckets_is_read(tmp_path, autoencoder):
    cache = make(tmp_path, autoencoder)
    path = cache.folder / "header.json"
    header = json.loads(path.read_text())
    (header["shape"],) = header.pop("shapes")
    path.write_text(json.dumps(header))
    again = make(tmp_path, autoencoder)
    assert torch.equal(again.read(6, True)[0], cache.read(6, True)[0])


@pytest.mark.parametrize("config", [CONFIG, BUCKETS])
def test_a_repeated_sample_is_encoded_once_and_kept_when_repeats_change(tmp_path, autoencoder, config):
    source = Shapes()
    combined = CombinedSource([Part(source, repeats=3), Part(Shapes(length=2, fingerprint="two"), weight=0.5)])
    cache = make(tmp_path, autoencoder, combined, config)
    assert sorted(source.reads) == list(range(7))
    again = CombinedSource([Part(source, repeats=5), Part(Shapes(length=2, fingerprint="two"))])
    assert make(tmp_path, autoencoder, again, config).folder == cache.folder
    assert sorted(source.reads) == list(range(7))
    alone = make(tmp_path / "alone", autoencoder, Shapes(), config)
    for index in range(len(combined)):
        expected = alone.read(index % 7 if index < 21 else index - 21, True)
        found = cache.read(distinct_index(combined, index), True)
        assert all(torch.allclose(a, b, atol=1e-3) for a, b in zip(found, expected, strict=True))


def test_the_loader_reads_the_moments_of_the_very_samples(tmp_path, autoencoder):
    """Through repeats and buckets, with flips: what comes out of the cache is the image that would have been read."""
    combined = CombinedSource([Part(Shapes(), repeats=2), Part(Shapes(length=3, fingerprint="three"), repeats=3)])
    buckets = open_buckets(tmp_path / "index", combined, BUCKETS, 2, Share())
    given_ = {"batch_size": 4, "seed": 2, "start_step": 0, "end_step": 8, "buckets": buckets}
    reader = make(tmp_path, autoencoder, combined, BUCKETS)
    cached = TrainingBatches(combined, BUCKETS, reader=reader, **given_)
    shapes = set()
    for one, other in zip(cached, TrainingBatches(combined, BUCKETS, **given_), strict=True):
        assert (one.keys, one.captions, one.images) == (other.keys, other.captions, None)
        wanted = encode(autoencoder, other.images)
        torch.testing.assert_close(one.moments[0], wanted.mean, rtol=2**-10, atol=1e-5)
        shapes.add(tuple(wanted.mean.shape))
    assert shapes == {(4, 3, 16, 8), (4, 3, 12, 12), (4, 3, 8, 16)}


@given(st.integers(1, 40), st.integers(0, 500))
def test_shares_cover_every_index_exactly_once(processes, length):
    parts = [Share(rank, processes).of(length) for rank in range(processes)]
    assert [index for part in parts for index in part] == list(range(length))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_latents_that_overflow_are_a_bad_sample_and_not_infinite(tmp_path, autoencoder, monkeypatch):
    from ldm.data import latent_encoding

    real = latent_encoding._encode_both_ways

    def overflowing(model, images, *, flips):
        encoded = real(model, images, flips=flips)
        encoded[images.flatten(1).mean(dim=1).argmax(), 0, 0, 0, 0, 0] = np.inf
        return encoded

    monkeypatch.setattr(latent_encoding, "_encode_both_ways", overflowing)
    cache = make(tmp_path, autoencoder)
    bad = set()
    for index in range(7):
        try:
            assert all(moment.isfinite().all() for moment in cache.read(index, False))
        except BadSample as error:
            assert "65,504" in error.reason
            bad.add(error.key)
    assert len(bad) == 3  # one of each of the three batches

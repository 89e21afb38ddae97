"""The same images every time, each batch of one shape."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from PIL import Image

from conditioning.inpainting import InpaintingConfig
from ldm.data import fixed_batches as module
from ldm.data.buckets import BucketsConfig, bucket_sizes, nearest_size
from ldm.data.combined import CombinedSource, Part
from ldm.data.fixed_batches import fixed_batches, fixed_images
from ldm.data.loader import Wanted
from ldm.data.sample import BadSample, Sample
from ldm.data.sources import DataConfig
from ldm.errors import UserError

CONFIG = DataConfig(root="unused", resolution=24, buckets=BucketsConfig(step=8))
SHAPES = bucket_sizes(24, BucketsConfig(step=8))
WANTED = Wanted(masks=InpaintingConfig())


@dataclass(frozen=True)
class Pictures:
    """Image i is all red value i."""

    sizes: tuple[tuple[int, int], ...] = ((20, 30), (30, 20), (25, 25), (60, 20), (10, 11), (9, 90), (44, 22))
    bad: frozenset[int] = frozenset({4})
    fingerprint: str = ""
    classes: tuple[str, ...] = ()
    semantic_classes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.sizes)

    def size(self, index: int) -> tuple[int, int]:
        return self.sizes[index]

    def read(self, index: int, *, with_image: bool = True) -> Sample:
        if index in self.bad:
            raise BadSample(f"{index}", "broken")
        return Sample(f"{index}", Image.new("RGB", self.sizes[index], (index, 0, 0)))


@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_batches_are_of_one_shape_and_hold_every_good_sample_once(batch_size: int) -> None:
    source = Pictures()
    places = {}
    for batch in fixed_batches(source, CONFIG, 99, batch_size, WANTED, seed=1):
        assert batch.images is not None and batch.masks is not None
        assert len(batch) <= batch_size
        for key, position, image, mask in zip(batch.keys, batch.positions, batch.images, batch.masks, strict=True):
            width, height = nearest_size(source.sizes[int(key)], SHAPES)
            assert image.shape == (3, height, width) and mask.shape == (1, height, width)
            assert round(float(image[0, 0, 0] + 1) * 127.5) == int(key)
            places[int(key)] = position
    assert places == {0: 0, 1: 1, 2: 2, 3: 3, 5: 4, 6: 5}


def test_masks_do_not_depend_on_the_batch_size() -> None:
    def masks(batch_size: int) -> dict[str, torch.Tensor]:
        found = {}
        for batch in fixed_batches(Pictures(), CONFIG, 99, batch_size, WANTED, seed=1):
            assert batch.masks is not None
            found |= dict(zip(batch.keys, batch.masks, strict=True))
        return found

    one, many = masks(1), masks(16)
    assert one.keys() == many.keys()
    assert all(torch.equal(one[key], many[key]) for key in one)


def test_every_sample_is_read_and_transformed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    real = module.apply_geometry

    def counted(sample: Sample, *rest: object) -> object:
        seen.append(sample.key)
        return real(sample, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "apply_geometry", counted)
    assert sum(len(batch) for batch in fixed_batches(Pictures(), CONFIG, 99, 4, WANTED, seed=1)) == 6
    assert seen == ["0", "1", "2", "3", "5", "6"]


def test_repeats_and_weights_do_not_count() -> None:
    source = CombinedSource([Part(Pictures(), repeats=4, weight=2.0), Part(Pictures(((9, 9),), frozenset()))])
    batches = list(fixed_batches(source, CONFIG, 99, 4, Wanted(), seed=1))
    keys = [key for batch in batches for key in batch.keys]
    assert sorted(keys) == [*(f"part 0/{index}" for index in (0, 1, 2, 3, 5, 6)), "part 1/0"]
    assert all(batch.weights is None for batch in batches)


def test_images_alone() -> None:
    squares = DataConfig(root="unused", resolution=8)
    (images,) = fixed_images(Pictures(), squares, 99)
    assert images.shape == (6, 3, 8, 8)
    shapes = [tuple(images.shape) for images in fixed_images(Pictures(), CONFIG, 99)]
    assert shapes == [(2, 3, 32, 16), (3, 3, 16, 32), (1, 3, 24, 24)]
    with pytest.raises(UserError, match="none of 2 images can be read"):
        list(fixed_images(Pictures(bad=frozenset(range(7))), squares, 2))

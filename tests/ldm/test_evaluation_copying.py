"""The copying check: planted copies of real scenes are found, fresh scenes are cleared, what it cannot see it says."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from autoencoder import Autoencoder, AutoencoderConfig, build_autoencoder, decode, encode
from ldm.data.images import to_tensor
from ldm.data.scene_rendering import render_image
from ldm.data.scenes import ScenesConfig, scene_at
from ldm.errors import UserError
from ldm.evaluation.copying import FALSE_ALARMS, CopyingCheck, CopyingReport, _flags, slightly_altered
from ldm.evaluation.latent_features import LatentExtractor

SIDE = 32
VARIED = ScenesConfig(max_objects=2)
TRAINING, HELD_OUT, FRESH = range(50), range(1000, 1300), range(2000, 2300)


def scenes(numbers: Iterable[int], config: ScenesConfig = VARIED) -> Tensor:
    return torch.stack([to_tensor(render_image(scene_at(config, i), SIDE)) for i in numbers])


@pytest.fixture(scope="module")
def autoencoder() -> Autoencoder:
    torch.manual_seed(0)
    config = AutoencoderConfig(
        latent_channels=4, channels=(8, 8), layers_per_block=1, mid_attention=False, norm_groups=4
    )
    return build_autoencoder(config).eval()


@pytest.fixture(scope="module")
def images() -> dict[str, Tensor]:
    return {"training": scenes(TRAINING), "held_out": scenes(HELD_OUT), "fresh": scenes(FRESH)}


def checked(autoencoder: Autoencoder, images: dict[str, Tensor], samples: Tensor) -> CopyingReport:
    check = CopyingCheck(
        LatentExtractor(autoencoder, SIDE),
        samples=samples.split(64),
        held_out=images["held_out"].split(64),
        planted=images["training"].split(20),
    )
    for part in images["training"].split(20):
        check.add(part)
    return check.result()


def blurred(images: Tensor, width: float) -> Tensor:
    steps = torch.arange(-3.0, 4.0)
    kernel = torch.exp(-steps.square() / (2 * width**2))
    kernel = torch.outer(kernel, kernel) / kernel.sum() ** 2
    return F.conv2d(F.pad(images, (3, 3, 3, 3), mode="replicate"), kernel.expand(3, 1, 7, 7), groups=3)


def noisy(images: Tensor, deviation: float) -> Tensor:
    """`deviation` in steps of 255."""
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(5))
    return (images + noise * deviation * 2 / 255).clamp(-1, 1)


def shifted(images: Tensor, pixels: float) -> Tensor:
    """To the right and down, by a fraction of a pixel."""
    across = (1 - pixels) * images + pixels * torch.roll(images, 1, -1)
    return (1 - pixels) * across + pixels * torch.roll(across, 1, -2)


@pytest.mark.parametrize(
    "alter",
    [
        pytest.param(lambda x: x, id="exact"),
        pytest.param(lambda x: noisy(x, 4), id="noise"),
        pytest.param(lambda x: noisy(blurred(x, 0.7), 3), id="blur"),
        pytest.param(lambda x: noisy(shifted(blurred(x, 0.4), 0.3), 2), id="shift"),
    ],
)
def test_a_planted_memorised_set_is_found(autoencoder, images, alter) -> None:
    report = checked(autoencoder, images, alter(images["training"]))
    assert report.flagged.value >= 0.95
    assert report.copies is True
    assert report.nearer > 0.95
    right = [pair.sample == pair.training for pair in report.pairs if pair.flagged]
    assert sum(right) >= 0.95 * len(right)  # and each is told whose copy it is
    assert report.verdict().startswith("COPIES of training images: ")


@pytest.mark.parametrize("alter", [lambda x: x, lambda x: noisy(blurred(x, 0.7), 3)], ids=["clean", "blurred"])
def test_fresh_scenes_are_cleared(autoencoder, images, alter) -> None:
    report = checked(autoencoder, images, alter(images["fresh"]))
    assert report.flagged.value <= 0.02
    assert report.copies is False
    assert 0.35 < report.nearer < 0.6
    assert report.planted >= 0.95
    assert report.verdict().startswith("no sign of copying: ")
    assert (report.n, report.held_out, report.training) == (300, 300, 50)


def test_a_few_copies_among_fresh_scenes_come_first(autoencoder, images) -> None:
    mixed = torch.cat([images["fresh"][:200], noisy(images["training"][:20], 3)])
    report = checked(autoencoder, images, mixed)
    assert report.copies is True
    assert {pair.sample for pair in report.pairs[:20]} == set(range(200, 220))
    assert [pair.flagged for pair in report.pairs] == sorted((pair.flagged for pair in report.pairs), reverse=True)
    assert {pair.sample for pair in report.pairs} == set(range(220))


def test_an_image_that_training_holds_many_times_is_found(autoencoder, images) -> None:
    """Its second neighbours are as near as its first, so the ratio alone would miss it."""
    repeated = torch.cat([images["training"], *[images["training"][:5]] * 14])
    report = checked(autoencoder, {**images, "training": repeated}, noisy(images["training"][:5], 2))
    assert report.flagged.value == 1


def test_distances_are_taken_through_the_autoencoder(autoencoder, images) -> None:
    @torch.no_grad()
    def through(pictures: Tensor) -> Tensor:
        return decode(autoencoder, encode(autoencoder, pictures).mean).clamp(-1, 1)

    def result(samples: Tensor) -> CopyingReport:
        check = CopyingCheck(
            LatentExtractor(autoencoder, SIDE),
            samples=[samples],
            held_out=[images["held_out"][:200]],
            planted=[images["training"][:20]],
            through=through,
        )
        check.add(images["training"])
        return check.result()

    copies = result(through(images["training"]))  # of an untrained autoencoder: nothing like the images themselves
    assert copies.flagged.value >= 0.95
    assert max(pair.pixel_distance for pair in copies.pairs) < 1
    assert result(through(images["fresh"][:150])).flagged.value <= 0.02


def test_data_of_few_pictures_cannot_show_copying(autoencoder) -> None:
    few = ScenesConfig(
        objects=("circle", "square"), colours=("red",), backgrounds=("white", "black"), sizes=("large",), held_out=0.0
    )
    images = {"training": scenes(range(300), few), "held_out": scenes(range(1000, 1150), few)}
    report = checked(autoencoder, images, scenes(range(3000, 3050), few))
    assert report.planted < 0.5
    assert report.copies is None
    assert "CANNOT TELL" in report.verdict()


def test_the_result_does_not_depend_on_batches(autoencoder, images) -> None:
    def result(size: int) -> CopyingReport:
        check = CopyingCheck(
            LatentExtractor(autoencoder, SIDE),
            samples=images["fresh"][:30].split(size),
            held_out=images["held_out"][:120].split(size),
            planted=images["training"].split(size),
        )
        for part in images["training"].split(size):
            check.add(part)
        return check.result()

    one, other = result(7), result(150)
    assert [pair.sample for pair in one.pairs] == [pair.sample for pair in other.pairs]
    assert [pair.training for pair in one.pairs] == [pair.training for pair in other.pairs]
    assert (one.flagged, one.planted, one.nearer) == (other.flagged, other.planted, other.nearer)


def test_one_in_a_hundred_of_the_same_kind_is_flagged() -> None:
    generator = torch.Generator().manual_seed(0)
    shares = []
    for _ in range(200):
        held_out, rows = (torch.randn(400, 2, generator=generator) for _ in range(2))
        shares.append(_flags(held_out, rows).double().mean().item())
    assert sum(shares) / len(shares) == pytest.approx(FALSE_ALARMS, abs=0.003)
    assert _flags(held_out, torch.tensor([[-9.0, 0.0], [0.0, -9.0], [0.0, 0.0]])).tolist() == [True, True, False]
    assert not _flags(torch.zeros(400, 2), torch.zeros(3, 2)).any()  # ties are no evidence


def test_too_few_images_are_refused(autoencoder, images) -> None:
    for samples, held_out, found in ((0, 200, "found 0 images in the set of samples"), (5, 99, "found 99 images")):
        with pytest.raises(UserError, match=found):
            checked(autoencoder, {**images, "held_out": images["held_out"][:held_out]}, images["fresh"][:samples])
    check = CopyingCheck(
        LatentExtractor(autoencoder, SIDE),
        samples=[images["fresh"]],
        held_out=[images["held_out"]],
        planted=[images["training"]],
    )
    check.add(images["training"][:2])
    with pytest.raises(UserError, match="found 2 images in the training set"):
        check.result()


def test_planted_copies_are_slightly_altered(images) -> None:
    altered = slightly_altered(images["training"], range(50), 0)
    error = (altered - images["training"]).square().mean().sqrt() * 127.5
    assert 2 < error < 15
    assert torch.equal(slightly_altered(images["training"][7:9], [7, 8], 0), altered[7:9])

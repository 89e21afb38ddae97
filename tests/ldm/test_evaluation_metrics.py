"""FID, KID, IS, precision and recall, density and coverage: closed forms, the reference library, equal sets."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric
from torchmetrics.image.fid import _compute_fid

from ldm.errors import UserError
from ldm.evaluation.bootstrap import mean_estimate, resampling_counts, wilson_interval
from ldm.evaluation.distances import Nearest, neighbour_radii, squared_distances
from ldm.evaluation.frechet import fid, frechet_distance
from ldm.evaluation.inception_score import inception_score
from ldm.evaluation.kernel_distance import kid
from ldm.evaluation.manifold import manifold
from ldm.evaluation.measurement import Estimate, Measurement, Setting
from ldm.evaluation.statistics import Moments


def normal(count: int, width: int, seed: int, shift: float = 0.0, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=torch.Generator().manual_seed(99)) / width**0.5
    return torch.randn(count, width, generator=generator) @ mixing * scale + shift


def moments(mean: Tensor, covariance: Tensor) -> Moments:
    result = Moments(len(mean))
    result.count, result.mean, result.scatter = 2, mean.double(), covariance.double()  # count - 1 = 1
    return result


# --- The same numbers as the libraries -------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "others", "width"), [(300, 400, 24), (40, 60, 64)], ids=["tall", "wide"])
def test_fid_is_torch_fidelitys_and_torchmetrics(count: int, others: int, width: int) -> None:
    samples, reference = normal(count, width, 0, 0.1, 1.2), normal(others, width, 1)
    found = fid(samples, Moments.of(reference), replicates=2).value
    stats = [fid_features_to_statistics(rows.double()) for rows in (samples, reference)]
    theirs = fid_statistics_to_metric(*stats, verbose=False)["frechet_inception_distance"]
    tensors = [torch.tensor(stat[name]) for stat in stats for name in ("mu", "sigma")]
    assert found == pytest.approx(theirs, rel=1e-4)
    assert found == pytest.approx(_compute_fid(*tensors).item(), rel=1e-4)


def test_kid_is_torch_fidelitys_over_the_whole_set() -> None:
    samples, reference = normal(200, 16, 0, 0.2).double(), normal(200, 16, 1).double()
    theirs = kid_features_to_metric(samples, reference, kid_subsets=2, kid_subset_size=200, verbose=False)
    assert kid(samples, reference, replicates=2).value == pytest.approx(
        theirs["kernel_inception_distance_mean"], rel=1e-4
    )


def test_kid_is_what_random_subsets_estimate() -> None:
    samples, reference = normal(200, 16, 0, 0.3).double(), normal(260, 16, 1).double()
    theirs = kid_features_to_metric(samples, reference, kid_subsets=400, kid_subset_size=50, verbose=False)
    error = theirs["kernel_inception_distance_std"] / 20
    assert abs(kid(samples, reference, replicates=2).value - theirs["kernel_inception_distance_mean"]) < 4 * error


def test_inception_score_is_torch_fidelitys_with_one_split() -> None:
    logits = normal(150, 10, 0, scale=3.0)
    theirs = isc_features_to_metric(logits, splits=1)["inception_score_mean"]
    assert inception_score(logits, replicates=2).value == pytest.approx(theirs, rel=1e-4)


def test_precision_and_recall_are_torch_fidelitys() -> None:
    samples, reference = normal(230, 8, 0, 0.3, 0.8), normal(300, 8, 1)
    theirs = prc_features_to_metric(samples, reference, prc_neighborhood=3, verbose=False)
    found = manifold(samples, reference)
    assert 0.1 < theirs["recall"] < 0.95  # a case that tells something
    assert found.precision.value == pytest.approx(theirs["precision"], rel=1e-4)
    assert found.recall.value == pytest.approx(theirs["recall"], rel=1e-4)


def test_density_and_coverage_are_their_definitions() -> None:
    samples, reference = normal(60, 6, 0, 0.4).double().numpy(), normal(80, 6, 1).double().numpy()
    between = np.linalg.norm(reference[:, None] - samples[None], axis=2)  # [m, n]
    within = np.sort(np.linalg.norm(reference[:, None] - reference[None], axis=2), axis=1)
    inside = between < within[:, 5:6]
    found = manifold(torch.from_numpy(samples), torch.from_numpy(reference))
    assert found.density.value == pytest.approx(inside.sum() / (5 * 60))
    assert found.coverage.value == pytest.approx(inside.any(1).mean())


# --- Known answers ---------------------------------------------------------------------------------------------------


def test_frechet_distance_of_gaussians_is_the_closed_form() -> None:
    a, b = torch.tensor([1.0, 4.0, 9.0]), torch.tensor([4.0, 1.0, 16.0])
    turn = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(0)).double())[0]
    shift = torch.tensor([3.0, 0.0, -4.0])
    expected = 25 + (a.sqrt() - b.sqrt()).square().sum().item()
    first = moments(torch.zeros(3), turn @ torch.diag(a.double()) @ turn.T)
    second = moments(shift, turn @ torch.diag(b.double()) @ turn.T)
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-10)
    one, other = moments(torch.zeros(1), torch.tensor([[4.0]])), moments(torch.ones(1), torch.tensor([[9.0]]))
    assert frechet_distance(one, other) == pytest.approx(1 + (2 - 3) ** 2)


def test_fid_of_many_gaussian_samples_is_the_closed_form() -> None:
    reference = moments(torch.zeros(4), torch.eye(4))
    found = fid(torch.randn(20_000, 4, generator=torch.Generator().manual_seed(0)) * 2 + 1, reference, replicates=20)
    assert found.value == pytest.approx(4 * 1 + 4 * (2 - 1) ** 2, rel=0.02)
    assert found.low is not None and found.high is not None
    assert found.low < 8 < found.high


@pytest.mark.parametrize(("count", "width"), [(200, 12), (30, 48)], ids=["tall", "wide"])
def test_identical_sets(count: int, width: int) -> None:
    rows = normal(count, width, 3).double()
    assert fid(rows, Moments.of(rows), replicates=2).value == pytest.approx(0, abs=1e-9)
    kernel = (rows @ rows.T / width + 1) ** 3
    diagonal = kernel.diagonal().mean().item()
    others = (kernel.sum().item() - diagonal * count) / (count * (count - 1))
    assert kid(rows, rows, replicates=2).value == pytest.approx(-2 * (diagonal - others) / count)  # unbiased: below 0
    found = manifold(rows, rows)
    assert (found.precision.value, found.recall.value, found.coverage.value) == (1, 1, 1)
    assert found.density.value == pytest.approx(1)
    assert found.precision.low is not None and found.precision.low < 1  # 100 % of few is not certain


def test_sets_far_apart() -> None:
    found = manifold(normal(50, 6, 0, 100.0), normal(50, 6, 1))
    assert [getattr(found, name).value for name in ("precision", "recall", "density", "coverage")] == [0, 0, 0, 0]


def test_inception_score_runs_from_one_to_the_number_of_classes() -> None:
    assert inception_score(torch.zeros(8, 5), replicates=2).value == pytest.approx(1)
    certain = torch.eye(5).repeat(4, 1) * 1000
    assert inception_score(certain, replicates=2).value == pytest.approx(5)


@settings(max_examples=8, deadline=None)
@given(st.randoms(use_true_random=False), st.integers(6, 40), st.integers(2, 20))
def test_the_order_of_images_does_not_matter(random, count: int, width: int) -> None:
    samples, reference = normal(count, width, count), normal(count + 5, width, 7)
    order, other_order = list(range(count)), list(range(count + 5))
    random.shuffle(order)
    random.shuffle(other_order)
    shuffled, reshuffled = samples[order], reference[other_order]

    def figures(left: Tensor, right: Tensor) -> list[Estimate]:
        balls = manifold(left, right)
        return [
            fid(left, Moments.of(right), replicates=3),
            kid(left, right, replicates=3),
            inception_score(left, replicates=3),
            balls.precision,
            balls.recall,
            balls.density,
            balls.coverage,
        ]

    for plain, mixed in zip(figures(samples, reference), figures(shuffled, reshuffled), strict=True):
        for name in ("value", "low", "high"):
            assert getattr(plain, name) == pytest.approx(getattr(mixed, name), rel=1e-6, abs=1e-7)


# --- Too few images --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 1])
def test_no_image_and_one_image_are_clear_errors(count: int) -> None:
    few, many = normal(count, 4, 0), normal(20, 4, 1)
    found = f"found {count} image"
    for call in (
        lambda: fid(few, Moments.of(many)),
        lambda: fid(many, Moments.of(few)),
        lambda: kid(few, many),
        lambda: kid(many, few),
        lambda: inception_score(few),
        lambda: manifold(few, many),
        lambda: manifold(many, few),
    ):
        with pytest.raises(UserError, match=found):
            call()


def test_few_images_are_warned_of() -> None:
    notes = " ".join(fid(normal(20, 4, 0), Moments.of(normal(30, 4, 1)), replicates=3).notes)
    assert "20 images, fewer than 10000" in notes
    assert "30 reference images" in notes
    assert "singular" in " ".join(fid(normal(5, 8, 0), Moments.of(normal(30, 8, 1)), replicates=3).notes)


def test_features_that_are_not_finite_are_refused() -> None:
    rows = normal(10, 3, 0)
    rows[3, 1] = math.nan
    with pytest.raises(UserError, match="NaN"):
        kid(rows, normal(10, 3, 1))


# --- Intervals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "width"), [(60, 10), (30, 60)], ids=["tall", "wide"])
def test_the_resampled_fids_are_those_of_repeated_images(count: int, width: int) -> None:
    from ldm.evaluation.frechet import _resampled

    rows, reference = normal(count, width, 0, 0.1).double(), Moments.of(normal(90, width, 1))
    fast = _resampled(rows, reference, seed=5, replicates=4)
    for value, counts in zip(fast, resampling_counts(count, 4, 5), strict=True):
        repeated = rows.repeat_interleave(counts.long(), dim=0)
        assert value.item() == pytest.approx(frechet_distance(Moments.of(repeated), reference), rel=1e-6)


@pytest.mark.parametrize("shift", [0.0, 0.5])
def test_the_fid_interval_is_the_scatter_of_fresh_sets_and_the_note_their_bias(shift: float) -> None:
    reference = moments(torch.zeros(8), torch.eye(8))
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randn(200, 8, generator=generator) + shift for _ in range(200)]
    fresh = [frechet_distance(Moments.of(each), reference) for each in rows]
    found = fid(rows[0], reference, replicates=200)
    assert found.low is not None and found.high is not None
    width, scatter = (found.high - found.low) / 2 / 1.96, float(np.std(fresh))
    assert 0.8 * scatter < width < (2.5 if shift == 0 else 1.3) * scatter
    bias = float(found.notes[0].rpartition(" ")[2])
    assert bias == pytest.approx(np.mean(fresh) - 8 * shift**2, rel=0.6)


def test_the_mean_interval_holds_the_mean_as_often_as_it_says() -> None:
    held = 0
    for seed in range(60):
        values = torch.randn(50, generator=torch.Generator().manual_seed(seed)) + 3
        found = mean_estimate(values, 0)
        assert found.low is not None and found.high is not None
        held += found.low <= 3 <= found.high
    assert 50 <= held <= 60  # 95 % of 60 is 57


def test_wilsons_interval() -> None:
    low, high = wilson_interval(8, 10)
    assert (low, high) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson_interval(10, 10)[1] == pytest.approx(1)


# --- Moments and distances -------------------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=6), st.integers(1, 5), st.floats(-1e3, 1e3))
def test_streamed_and_merged_moments_are_those_of_the_whole(sizes: list[int], width: int, shift: float) -> None:
    parts = [normal(size, width, i, shift).double() for i, size in enumerate(sizes)]
    whole = torch.cat(parts)
    streamed, left, right = Moments(width), Moments(width), Moments(width)
    for i, part in enumerate(parts):
        streamed.update(part)
        (left if i % 2 else right).update(part)
    left.merge(right)
    for found in (streamed, left):
        assert found.count == len(whole)
        if len(whole) >= 2:
            assert torch.allclose(found.mean, whole.mean(0), atol=1e-9)
            expected = torch.from_numpy(np.atleast_2d(np.cov(whole.numpy(), rowvar=False)))
            assert torch.allclose(found.covariance(), expected, atol=1e-8)
    if len(whole) < 2:
        with pytest.raises(UserError, match="2 or more"):
            streamed.covariance()


def test_distances_between_equal_rows_are_zero() -> None:
    rows = normal(20, 30, 0) + 1000
    squares = squared_distances(rows, rows)
    assert (squares.diagonal() == 0).all()
    expected = (rows.double()[:, None] - rows.double()[None]).square().sum(2)
    assert torch.allclose(squares, expected, rtol=1e-6)
    assert torch.allclose(neighbour_radii(rows, 3), expected.sort(1).values[:, 3], rtol=1e-6)


def test_the_nearest_of_a_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ldm.evaluation.distances.CHUNK_ELEMENTS", 50)
    queries, rows = normal(13, 5, 0), normal(40, 5, 1)
    nearest = Nearest(queries, 3)
    for part in rows.split(7):
        nearest.add(part)
    expected = squared_distances(queries, rows).topk(3, largest=False)
    assert torch.equal(nearest.indices, expected.indices)
    assert torch.allclose(nearest.squares, expected.values)


def test_a_measurement_tells_all_that_it_depends_on() -> None:
    setting = Setting(
        n=500, resolution=64, extractor="inception-v3", resize_filter="bicubic", reference="flowers", reference_n=900
    )
    found = Measurement("fid", "FID", "lower", Estimate(12.345, 11.8, 12.9, ("warning: few",)), setting)
    assert found.line() == (
        "FID 12.35 [11.8, 12.9]; n = 500, 64 px, against flowers (900 images), inception-v3, resized: bicubic; "
        "warning: few"
    )
    assert found.to_json()["interval"] == [11.8, 12.9]
    assert found.to_json()["n"] == 500

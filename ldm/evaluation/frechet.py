"""Frechet distance between two sets of features (FID, arXiv 1706.08500; sFID, arXiv 2103.03841).

Own code, equal to torch-fidelity's (by test): that takes the eigenvalues of a matrix that is not symmetric, which at
2,048 features costs minutes, and gives no interval.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ldm.evaluation.bootstrap import fixed_order, resampling_counts, spread_estimate
from ldm.evaluation.measurement import Estimate, check_count
from ldm.evaluation.statistics import Moments

FEW_IMAGES = 10_000
"""Below it FID is a figure for comparisons at the same n only."""


def frechet_distance(first: Moments, second: Moments) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), at least 0.

    With C = L L^T the trace of the root is the sum of the singular values of L1^T L2, which keeps its precision where
    eigenvalues of C1 C2 near 0 would lose half of the digits.
    """
    c1, c2 = first.covariance(), second.covariance()
    root = torch.linalg.svdvals(_factor(c1).T @ _factor(c2)).sum()
    distance = (first.mean - second.mean).square().sum() + c1.trace() + c2.trace() - 2 * root
    return max(0.0, distance.item())


def fid(samples: Tensor, reference: Moments, seed: int = 0, replicates: int = 100) -> Estimate:
    """FID of sample features [n, D] against the moments of a reference.

    The interval is the scatter at this n. FID is biased upwards by an amount that falls as 1/n; the resampled sets are
    biased once more by about as much, which the note tells. Raises `UserError` for n < 2.
    """
    check_count("samples", len(samples), 2, "FID")
    rows = fixed_order(samples)  # [n, D]
    value = frechet_distance(Moments.of(rows), reference)
    values = _resampled(rows, reference, seed, replicates)
    notes = [f"its bias at this n is about {values.mean().item() - value:+.3g}"]
    if len(rows) < FEW_IMAGES:
        notes.append(f"warning: {len(rows)} images, fewer than {FEW_IMAGES}: compare only with figures at the same n")
    if reference.count < FEW_IMAGES:
        notes.append(f"warning: {reference.count} reference images, fewer than {FEW_IMAGES}")
    if len(rows) <= rows.shape[1]:
        notes.append(f"no more images than features ({rows.shape[1]}): the covariance is singular")
    return spread_estimate(value, values, tuple(notes), least=0.0)


def _factor(covariance: Tensor) -> Tensor:
    """L [D, r] with L L^T = C; directions of no variance left out."""
    values, vectors = torch.linalg.eigh(covariance)
    kept = values > values[-1].clamp_min(0) * 1e-14
    return vectors[:, kept] * values[kept].sqrt()


def _resampled(rows: Tensor, reference: Moments, seed: int, replicates: int) -> Tensor:
    """FID of `replicates` resamplings of the rows [n, D], [R].

    As C2 = L L^T, the trace of (C1 C2)^(1/2) needs the eigenvalues of L^T C1 L = Y^T Y / (n - 1), Y = (X - m1) L, or,
    if there are fewer images than features, the same ones of Y Y^T, a part of one matrix computed once.
    """
    count = len(rows)
    centre = rows.mean(0)
    centred = rows - centre  # [n, D]
    shift = centre - reference.mean
    covariance = reference.covariance()
    projected = centred @ _factor(covariance)  # Y: [n, r]
    wide = count < projected.shape[1]
    gram = projected @ projected.T if wide else None  # [n, n]
    norms = centred.square().sum(1)
    values = torch.empty(replicates, dtype=torch.float64)
    for i, counts in enumerate(resampling_counts(count, replicates, seed)):
        step = counts @ centred / count  # the resampled mean, less the centre
        trace = (counts @ norms - count * step.square().sum()) / (count - 1)
        squares = _weighted_covariance(projected, counts) if gram is None else _weighted_gram(gram, counts)
        root = torch.linalg.eigvalsh(squares / (count - 1)).clamp_min(0).sqrt().sum()
        values[i] = (shift + step).square().sum() + trace + covariance.trace() - 2 * root
    return values


def _weighted_covariance(projected: Tensor, counts: Tensor) -> Tensor:
    """Y^T W Y about the weighted mean, [r, r]."""
    drawn = counts > 0
    rows, weights = projected[drawn], counts[drawn]
    mean = weights @ rows / weights.sum()
    return (rows * weights[:, None]).T @ rows - weights.sum() * torch.outer(mean, mean)


def _weighted_gram(gram: Tensor, counts: Tensor) -> Tensor:
    """W^(1/2) Y Y^T W^(1/2) about the weighted mean: the same eigenvalues beside zeros, [drawn, drawn]."""
    drawn = counts > 0
    weights = counts[drawn]
    inner = gram[drawn][:, drawn]
    share = inner @ weights / weights.sum()
    centred = inner - share[:, None] - share[None] + weights @ share / weights.sum()
    roots = weights.sqrt()
    return centred * roots[:, None] * roots[None]

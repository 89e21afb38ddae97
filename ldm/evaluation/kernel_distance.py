"""Kernel distance between two sets of features (KID, arXiv 1801.01401).

Over all pairs, not over random subsets: it is the mean of all subsets' values, so it needs no draw and does not depend
on the images' order. Equal to torch-fidelity's where its subset is the whole set (by test).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ldm.evaluation.bootstrap import fixed_order, resampling_counts, spread_estimate
from ldm.evaluation.distances import CHUNK_ELEMENTS
from ldm.evaluation.measurement import Estimate, check_count


def polynomial_kernel(left: Tensor, right: Tensor) -> Tensor:
    """(x . y / D + 1)^3 of rows [n, D] and [m, D]: [n, m]."""
    return (left @ right.T / left.shape[1] + 1) ** 3


def kid(samples: Tensor, reference: Tensor, seed: int = 0, replicates: int = 200) -> Estimate:
    """The unbiased squared MMD of features [n, D] and [m, D] with `polynomial_kernel` (arXiv 1801.01401, eq. 4).

    Its expectation does not depend on n. Being unbiased it may be slightly below 0, and is so for two identical sets.
    Raises `UserError` for fewer than two images in a set.
    """
    check_count("samples", len(samples), 2, "KID")
    check_count("reference", len(reference), 2, "KID")
    left, right = fixed_order(samples), reference.double()
    count, others = len(left), len(right)
    counts = resampling_counts(count, replicates, seed)
    rows = torch.cat([torch.ones(1, count, dtype=torch.float64), counts])  # [1 + R, n]: the set itself, then resampled
    within = torch.zeros(len(rows), dtype=torch.float64)  # sums of w_i w_j k(x_i, x_j) over i != j
    across = torch.zeros(len(rows), dtype=torch.float64)  # sums of w_i k(x_i, y_j)
    for part in _parts(count, max(count, others)):
        kernel = polynomial_kernel(left[part], left)  # [c, n]
        kernel[torch.arange(len(kernel)), torch.arange(part.start, part.stop)] = 0
        within += (rows[:, part] * (rows @ kernel.T)).sum(1)
        across += rows[:, part] @ polynomial_kernel(left[part], right).sum(1)
    pairs = rows.sum(1).square() - rows.square().sum(1)
    values = within / pairs + _mean_off_diagonal(right) - 2 * across / (count * others)
    return spread_estimate(values[0].item(), values[1:])


def _mean_off_diagonal(rows: Tensor) -> float:
    total = 0.0
    for part in _parts(len(rows), len(rows)):
        kernel = polynomial_kernel(rows[part], rows)
        diagonal = kernel[torch.arange(len(kernel)), torch.arange(part.start, part.stop)]
        total += (kernel.sum() - diagonal.sum()).item()
    return total / (len(rows) * (len(rows) - 1))


def _parts(count: int, width: int) -> list[slice]:
    step = max(1, CHUNK_ELEMENTS // width)
    return [slice(first, min(first + step, count)) for first in range(0, count, step)]

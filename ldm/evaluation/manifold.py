"""Precision, recall, density and coverage: do the samples lie where real images lie, and everywhere they do?

Real images' manifold is the union of balls round each, out to its k-th nearest neighbour.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.evaluation.bootstrap import mean_estimate, share_estimate
from ldm.evaluation.distances import distance_chunks, neighbour_radii
from ldm.evaluation.measurement import Estimate, check_count

PRECISION_K = 3
"""Kynkaanniemi et al., arXiv 1904.06991."""
DENSITY_K = 5
"""Naeem et al., arXiv 2002.09797."""
_WIDER, _NARROWER = 1 + 1e-9, 1 - 1e-9
"""The first paper counts a picture on the edge of a ball, the second does not; rounding must not decide."""


@dataclass(frozen=True)
class Manifold:
    """Four figures. Each interval is over the images that are asked (samples for precision and density, reference
    images for recall and coverage), with the balls held fixed."""

    precision: Estimate
    recall: Estimate
    density: Estimate
    coverage: Estimate


def manifold(samples: Tensor, reference: Tensor, seed: int = 0) -> Manifold:
    """Compare features [n, D] of samples with those [m, D] of real images.

    precision: share of samples within a real image's ball (k = 3); recall: share of real images within a sample's
    (arXiv 1904.06991, eq. 2); density: mean number of real images' balls round a sample, over k = 5 (arXiv 2002.09797,
    eq. 4); coverage: share of real images whose ball holds a sample (eq. 6). For identical sets all four are 1, unless
    images occur more than k times. Raises `UserError` for a set of no more than 5 images.
    """
    check_count("samples", len(samples), DENSITY_K + 1, "precision and recall")
    check_count("reference", len(reference), DENSITY_K + 1, "precision and recall")
    real_small, real_large = neighbour_radii(reference, PRECISION_K), neighbour_radii(reference, DENSITY_K)  # [m]
    own = neighbour_radii(samples, PRECISION_K)  # [n]
    precise = torch.empty(len(samples), dtype=torch.bool)
    density = torch.empty(len(samples), dtype=torch.float64)
    for part, squares in distance_chunks(samples, reference):
        precise[part] = (squares <= real_small * _WIDER).any(1)
        density[part] = (squares < real_large * _NARROWER).double().sum(1) / DENSITY_K
    recalled = torch.empty(len(reference), dtype=torch.bool)
    covered = torch.empty(len(reference), dtype=torch.bool)
    for part, squares in distance_chunks(reference, samples):
        recalled[part] = (squares <= own * _WIDER).any(1)
        covered[part] = squares.min(1).values < real_large[part] * _NARROWER
    note = (f"k = {PRECISION_K}",), (f"k = {DENSITY_K}",)
    return Manifold(
        precision=share_estimate(precise, note[0]),
        recall=share_estimate(recalled, note[0]),
        density=mean_estimate(density, seed, note[1]),
        coverage=share_estimate(covered, note[1]),
    )

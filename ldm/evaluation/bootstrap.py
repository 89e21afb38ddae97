"""Confidence intervals: how far a figure would move if other images of the same kind had been measured.

The reference is held fixed: an interval tells the scatter of the measured images alone. Two rules, both deterministic:
- a mean of one number per image: percentiles of the resampled means;
- anything else: the value +- 1.96 standard deviations of the resampled values. Resampling repeats images, which moves
  biased figures such as FID and IS by about their own bias once more, so percentiles would lie beside the value. Where
  the value is little but bias, as FID of two alike sets, the interval is up to twice too wide.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ldm.errors import UserError
from ldm.evaluation.measurement import Estimate
from ldm.randomness import derive_seed, generator_for

NORMAL_QUANTILE = 1.959964
"""Of 97.5 %."""
REPLICATES = 1000
"""Resamplings of a mean, which cost nothing."""
_DRAWS_AT_ONCE = 4_000_000


def resampling_counts(count: int, replicates: int, seed: int) -> Tensor:
    """How often each of `count` images is drawn in each resampling, [replicates, count] float64, rows sum to `count`.

    Row i depends on (seed, i) alone.
    """
    counts = torch.empty(replicates, count, dtype=torch.float64)
    for i, row in enumerate(counts):
        drawn = torch.randint(count, (count,), generator=generator_for(seed, "bootstrap", i))
        row.copy_(torch.bincount(drawn, minlength=count))
    return counts


def fixed_order(rows: Tensor) -> Tensor:
    """The rows of [n, D] sorted by a fixed random projection, float64: resampling must not see the order of the files.

    Raises `UserError` for values that are not finite.
    """
    rows = rows.double()
    if not rows.isfinite().all():
        raise UserError("features: found NaN or Inf; allowed are finite numbers; compute them in fp32")
    direction = torch.randn(rows.shape[1], dtype=torch.float64, generator=generator_for("fixed order"))
    return rows[torch.argsort(rows @ direction, stable=True)]


def mean_estimate(values: Tensor, seed: int, notes: tuple[str, ...] = ()) -> Estimate:
    """The mean of one number per image, `values` [n], with its percentile interval; no interval for n = 1."""
    values = values.double().flatten().sort().values
    if len(values) < 2:
        return Estimate(values.mean().item(), notes=(*notes, "one image has no interval"))
    count, generator = len(values), generator_for(seed, "bootstrap mean")
    parts = torch.ones(REPLICATES).split(max(1, _DRAWS_AT_ONCE // count))
    means = torch.cat([values[torch.randint(count, (len(part), count), generator=generator)].mean(1) for part in parts])
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Estimate(values.mean().item(), low, high, notes)


def spread_estimate(
    value: float, replicates: Tensor, notes: tuple[str, ...] = (), least: float = -math.inf
) -> Estimate:
    """`value` +- 1.96 standard deviations of the resampled values [R], cut at the `least` that it can be."""
    reach = NORMAL_QUANTILE * replicates.std().item()
    return Estimate(value, max(least, value - reach), value + reach, notes)


def share_estimate(hits: Tensor, notes: tuple[str, ...] = ()) -> Estimate:
    """The share of True in `hits` [n] with Wilson's interval (a bootstrap of 100 % would be [100 %, 100 %])."""
    low, high = wilson_interval(int(hits.sum()), len(hits))
    return Estimate(hits.double().mean().item(), low, high, notes)


def wilson_interval(hits: int, count: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927)."""
    z, share = NORMAL_QUANTILE, hits / count
    scale = 1 + z * z / count
    middle = (share + z * z / (2 * count)) / scale
    reach = z / scale * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return max(0.0, middle - reach), min(1.0, middle + reach)


def metric_seed(seed: int, name: str) -> int:
    """A seed of a metric's own, so that two metrics are not resampled alike by accident."""
    return derive_seed(seed, "metric", name)

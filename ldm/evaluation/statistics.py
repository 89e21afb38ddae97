"""Mean and covariance of features, gathered batch by batch in float64; parts gathered apart can be merged."""

from __future__ import annotations

import torch
from torch import Tensor

from ldm.evaluation.measurement import check_count


class Moments:
    """Streaming mean and covariance of rows [B, D] (Chan et al. 1979). Constant memory: D x D."""

    def __init__(self, width: int) -> None:
        self.count = 0
        self.mean = torch.zeros(width, dtype=torch.float64)
        self.scatter = torch.zeros(width, width, dtype=torch.float64)
        """Sum of (x - mean) (x - mean)^T."""

    @classmethod
    def of(cls, rows: Tensor, chunk: int = 4096) -> Moments:
        """The moments of rows [n, D]."""
        moments = cls(rows.shape[1])
        for part in rows.split(chunk):
            moments.update(part)
        return moments

    @property
    def width(self) -> int:
        """D."""
        return len(self.mean)

    def update(self, rows: Tensor) -> None:
        """Add rows [B, D]."""
        rows = rows.detach().cpu().double()
        if len(rows):
            mean = rows.mean(0)
            centred = rows - mean
            self._join(len(rows), mean, centred.T @ centred)

    def merge(self, other: Moments) -> None:
        """Add what another process or part has gathered; `other` stays as it is."""
        if other.count:
            self._join(other.count, other.mean, other.scatter)

    def _join(self, count: int, mean: Tensor, scatter: Tensor) -> None:
        total = self.count + count
        step = mean - self.mean
        self.scatter = self.scatter + scatter + torch.outer(step, step) * (self.count * count / total)
        self.mean = self.mean + step * (count / total)
        self.count = total

    def covariance(self) -> Tensor:
        """Unbiased, [D, D]. Raises `UserError` for fewer than two rows."""
        check_count("set", self.count, 2, "covariance")
        return self.scatter / (self.count - 1)

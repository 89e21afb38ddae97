"""Euclidean distances between many rows: in chunks, in float64, with exact zeros for equal rows."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

CHUNK_ELEMENTS = 16_000_000
"""Distances held at once: 128 MB."""
_ROUNDING = 1e-13
"""Share of |x|^2 + |y|^2 below which a squared distance is rounding noise."""


def squared_distances(left: Tensor, right: Tensor) -> Tensor:
    """|x - y|^2 of rows [n, D] and [m, D], float64: [n, m]. Distances of equal rows are exactly 0."""
    left, right = left.double(), right.double()
    norms = left.square().sum(1)[:, None] + right.square().sum(1)[None]
    squares = torch.addmm(norms, left, right.T, alpha=-2)  # [n, m]
    return torch.where(squares <= _ROUNDING * norms, 0.0, squares)


def distance_chunks(left: Tensor, right: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """`squared_distances` for one run of rows of `left` after the other: (which rows, [c, m])."""
    step = max(1, CHUNK_ELEMENTS // max(1, len(right)))
    for first in range(0, len(left), step):
        rows = slice(first, min(first + step, len(left)))
        yield rows, squared_distances(left[rows], right)


def neighbour_radii(rows: Tensor, k: int) -> Tensor:
    """Squared distance of each row [n, D] to its k-th nearest other row, [n]. Needs n > k."""
    radii = torch.empty(len(rows), dtype=torch.float64)
    for part, squares in distance_chunks(rows, rows):
        radii[part] = squares.kthvalue(k + 1, dim=1).values  # the nearest is the row itself
    return radii


class Nearest:
    """The k nearest of a stream of rows for each query, in constant memory.

    `squares` [q, k] are ascending squared distances, `indices` [q, k] the numbers of the rows; infinite and -1 as long
    as fewer than k rows have come.
    """

    def __init__(self, queries: Tensor, k: int) -> None:
        self.queries = queries.detach().cpu().double()
        self.squares = torch.full((len(queries), k), torch.inf, dtype=torch.float64)
        self.indices = torch.full((len(queries), k), -1, dtype=torch.int64)
        self.seen = 0

    def add(self, rows: Tensor) -> None:
        """The next rows [B, D] of the stream, numbered on from the last."""
        rows = rows.detach().cpu().double()
        numbers = torch.arange(self.seen, self.seen + len(rows))
        for part, squares in distance_chunks(self.queries, rows):
            both = torch.cat([self.squares[part], squares], dim=1)
            names = torch.cat([self.indices[part], numbers.expand(len(squares), -1)], dim=1)
            best = both.topk(self.squares.shape[1], dim=1, largest=False)
            self.squares[part], self.indices[part] = best.values, names.gather(1, best.indices)
        self.seen += len(rows)

"""Reducing pixels to latent cells by the area that they share; exact for every pair of sizes, not only whole ratios.

torch's `area` interpolation is not: where the sizes do not divide, its windows overlap and weigh all pixels alike.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def area_mean(values: Tensor, height: int, width: int) -> Tensor:
    """The mean of `values` [B, C, H, W] over each cell of a `height` x `width` grid, weighted by area: [B, C, h, w].

    The weights are whole numbers and divided at the end, so a cell full of ones is exactly 1, and any pixel above 0
    makes its cell be above 0. Computed in float32 (float64 for such values), returned in the type of `values`.
    """
    rows = _overlap_matrix(values.shape[-2], height)  # [h, H]
    columns = _overlap_matrix(values.shape[-1], width)  # [w, W]
    area = float(rows[0].sum() * columns[0].sum())
    dtype = torch.float64 if values.dtype == torch.float64 else torch.float32
    rows, columns = (matrix.to(values.device, dtype, non_blocking=True) for matrix in (rows, columns))
    with torch.autocast(values.device.type, enabled=False):  # which would compute in half precision
        summed = rows @ values.to(dtype) @ columns.T  # [B, C, h, w]
    return (summed / area).to(values.dtype)


def area_shares(indices: Tensor, classes: int, height: int, width: int) -> Tensor:
    """How much of each cell each class covers: `indices` int64 [B, H, W] in 0..classes-1 -> float32 [B, K, h, w].

    The shares of a cell sum to 1, and a class that is not in the cell has exactly 0. It equals `area_mean` of the
    one-hot maps, but adds every pixel to its cells instead: the one-hot maps, K times as large, are never built.
    """
    batch = indices.shape[0]
    device = indices.device
    rows, columns = _overlaps(indices.shape[-2], height), _overlaps(indices.shape[-1], width)
    area = float(sum(int(weight.sum()) for _, weight in rows) * sum(int(weight.sum()) for _, weight in columns))
    first = (torch.arange(batch, device=device) * classes).view(-1, 1, 1)
    base = (indices + first) * (height * width)  # [B, H, W], where the plane of each pixel's class begins
    shares = torch.zeros(batch * classes * height * width, device=device)
    for row, tall in rows:
        for column, wide in columns:
            cell = (row * width).view(-1, 1) + column  # [H, W]
            weight = (tall.view(-1, 1) * wide).to(device, torch.float32, non_blocking=True)  # [H, W]
            place = base + cell.to(device, non_blocking=True)  # [B, H, W]
            shares.scatter_add_(0, place.flatten(), weight.expand_as(place).flatten())
    return shares.div_(area / (height * width)).view(batch, classes, height, width)


def _overlaps(pixels: int, cells: int) -> list[tuple[Tensor, Tensor]]:
    """Along one axis: for each pixel its first cell, its second and so on, with the length that they share.

    Pairs of (cell int64 [pixels], length int64 [pixels]); 0 where a pixel has no such cell. The unit of length is the
    longest that makes both a pixel and a cell a whole number of it.
    """
    unit = math.gcd(pixels, cells)
    pixel, cell = cells // unit, pixels // unit  # their lengths
    start = torch.arange(pixels) * pixel
    first = start // cell
    most = int(((start + pixel - 1) // cell - first).max()) + 1
    pairs = []
    for number in range(most):
        place = first + number
        shared = torch.minimum(start + pixel, (place + 1) * cell) - torch.maximum(start, place * cell)
        pairs.append((place.clamp(max=cells - 1), shared.clamp(min=0)))
    return pairs


def _overlap_matrix(pixels: int, cells: int) -> Tensor:
    """The same lengths as a matrix int64 [cells, pixels]; every row has the same sum."""
    matrix = torch.zeros(cells, pixels, dtype=torch.int64)
    for place, shared in _overlaps(pixels, cells):
        matrix.scatter_add_(0, place[None], shared[None])
    return matrix

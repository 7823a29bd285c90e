"""Rows of a grid averaged softly around the centres of a smaller grid, and all rows again from what
became of the centres."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, normalize

_LEAST = 1e-16
"""What the weights of a centre add up to at least."""


def clustered(
    rows: Tensor,
    grid: tuple[int, int],
    centres: tuple[int, int],
    *,
    rounds: int,
    temperature: float,
    window: int,
) -> tuple[Tensor, Tensor]:
    """Soft k-means, from the means of the centres' cells. In each round the weights of a row are a
    softmax over the centres of `window` x `window` cells around its own, of the negative squared
    distance times `temperature`; a centre becomes the mean of the rows, so weighted.

    Args:
        rows: (B, N, C) float32, row by row of `grid`.
        centres: rows and columns of centres, at most those of `grid`.
        rounds: at least 1.

    Returns:
        what makes the centres of the rows (B, K, N), and the nearest of all centres to each row
        (B, N), the first of several.
    """
    (high, wide), (cells_high, cells_wide) = grid, centres
    pooled = adaptive_avg_pool2d(rows.mT.unflatten(2, grid), centres)
    found = pooled.flatten(2).mT.contiguous()  # else sums depend on the number of pictures
    radius = window // 2
    far = _far(high, cells_high, radius, rows.device)[:, None, :, None]
    far = far | _far(wide, cells_wide, radius, rows.device)[None, :, None]
    far = far.flatten(2).flatten(0, 1)
    for _ in range(rounds):
        likeness = -temperature * _distances(found, rows)
        weights = likeness.masked_fill_(far, -torch.inf).softmax(1)
        weights = weights / weights.sum(2, keepdim=True).clamp_min(_LEAST)
        found = weights @ rows
    return weights, _distances(found, rows).argmin(1)


def restored(
    before: Tensor, centres: Tensor, after: Tensor, *, temperature: float, nearest: int
) -> Tensor:
    """Each row as a mix of what became of its `nearest` centres (of more, where distances are
    equal), with weights exp(-temperature x squared distance) of unit length.

    Args:
        before: (B, N, C) float32, the rows.
        centres: (B, K, C) float32, as they were made of the rows.
        after: (B, K, D), what became of these.

    Returns:
        (B, N, D) in the dtype of `after`.
    """
    distances = _distances(before, centres).clamp_min(0)
    # From the nearest one: a length of 1 cancels the factor, and far rows are not all zeros.
    distances = distances - distances.amin(2, keepdim=True)
    weights = (-temperature * distances).exp()
    least = weights.topk(min(nearest, weights.shape[2])).values[..., -1:]
    weights = normalize(weights.masked_fill(weights < least, 0), dim=2)
    return (weights @ after.float()).to(after.dtype)


def _distances(rows: Tensor, columns: Tensor) -> Tensor:
    """Squared ones between (B, R, C) and (B, S, C): (B, R, S)."""
    lengths = rows.square().sum(2)[:, :, None] + columns.square().sum(2)[:, None]
    return lengths - 2 * rows @ columns.mT


def _far(size: int, cells: int, radius: int, device: torch.device) -> Tensor:
    """Which places of a line are more than `radius` cells away from each cell: (cells, size)."""
    own = torch.arange(size, device=device) * cells // size
    return (own - torch.arange(cells, device=device)[:, None]).abs() > radius

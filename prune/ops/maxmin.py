"""Greedy max-min selection: each pick is the token farthest from all tokens picked before."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

from . import cosine
from .on_gpu import in_one_kernel

_BLOCK = 256


def greedy_max_min(images: Sequence[Tensor], count: int) -> Tensor:
    """Pick `count` tokens of each image that are far from each other in cosine distance.

    The first pick is the token whose nearest other token is farthest. A running minimum holds each
    token's distance to the picks so far, so that a pick costs O(N), for all images at once. Picks
    stay on the device: the host never waits, and a GPU makes all of them in one kernel. No token is
    picked twice, and ties go to the lower index.

    Args:
        images: (N, D) each, of the same size, compared in float32.
        count: how many, 1 <= count <= N.

    Returns:
        (B, count) int64 indices in the order of picking.
    """
    units = [normalize(features.float(), dim=-1) for features in images]
    if len(units[0]) > cosine.STORE_UP_TO:
        return torch.stack([_by_rows(unit, count) for unit in units])
    return torch.cat([_stored(part, count) for part in cosine.at_once(units)])


def _stored(units: Sequence[Tensor], count: int) -> Tensor:
    """The picks (B, count) in rows (N, D) of length 1, from their distances in memory."""
    distances = cosine.grams(units).neg_().add_(1)
    diagonal = distances.diagonal(dim1=1, dim2=2)
    diagonal.fill_(torch.inf)
    nearest = distances.amin(1)
    first = nearest.argmax(1, keepdim=True)
    diagonal.fill_(-torch.inf)  # a pick takes itself out of the race
    if in_one_kernel(distances):
        from . import triton_kernels  # Triton, which is there on a GPU only

        return triton_kernels.max_min(distances, first[:, 0], count)
    picks = first.new_empty(len(units), count)
    picks[:, :1] = last = first
    nearest.fill_(torch.inf)
    for i in range(1, count):
        torch.minimum(nearest, cosine.rows_of(distances, last), out=nearest)
        last = nearest.argmax(1, keepdim=True)
        picks[:, i : i + 1] = last
    return picks


def _by_rows(unit: Tensor, count: int) -> Tensor:
    """The picks (count,) in rows (N, D) of length 1, whose distances are computed pick by pick."""
    picks = torch.empty(count, dtype=torch.int64, device=unit.device)
    torch.argmax(_nearest_other(unit), dim=0, keepdim=True, out=picks[:1])
    nearest = unit.new_full((len(unit),), torch.inf)
    for i in range(1, count):
        last = picks[i - 1 : i]
        row = (1 - unit @ unit.index_select(0, last)[0]).index_fill_(0, last, -torch.inf)
        torch.minimum(nearest, row, out=nearest)
        torch.argmax(nearest, dim=0, keepdim=True, out=picks[i : i + 1])
    return picks


def _nearest_other(unit: Tensor) -> Tensor:
    """Distance (N,) from each row of (N, D) to its nearest other row, a block at a time."""
    nearest = unit.new_empty(len(unit))
    for start in range(0, len(unit), _BLOCK):
        rows = 1 - unit[start : start + _BLOCK] @ unit.T
        rows.diagonal(start).fill_(torch.inf)
        nearest[start : start + _BLOCK] = rows.amin(1)
    return nearest

"""Greedy max-min selection: each pick is the token farthest from all tokens picked before."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from .cosine import STORE_UP_TO as _STORE_UP_TO
from .cosine import gram
from .fusing import fusable

_BLOCK = 256


def greedy_max_min(features: Tensor, count: int) -> Tensor:
    """Pick `count` tokens that are far from each other in cosine distance.

    The first pick is the token whose nearest other token is farthest. A running minimum holds each
    token's distance to the picks so far, so that a pick costs O(N). Picks stay on the device: the
    host never waits, and a GPU makes all of them in one kernel. No token is picked twice, and ties
    go to the lower index.

    Args:
        features: (N, D), compared in float32.
        count: how many, 1 <= count <= N.

    Returns:
        (count,) int64 indices in the order of picking.
    """
    unit = normalize(features.float(), dim=-1)
    stored = gram(unit).neg_().add_(1) if len(unit) <= _STORE_UP_TO else None
    nearest = _nearest_other(unit) if stored is None else stored.fill_diagonal_(torch.inf).amin(0)
    if stored is not None:
        stored.fill_diagonal_(-torch.inf)  # a pick takes itself out of the race
        if fusable(stored):
            from . import fused  # Triton, which is there on a GPU only

            return fused.max_min(stored[None], nearest.argmax(0, keepdim=True), count)[0]

    picks = torch.empty(count, dtype=torch.int64, device=unit.device)
    torch.argmax(nearest, dim=0, keepdim=True, out=picks[:1])
    nearest.fill_(torch.inf)
    for i in range(1, count):
        last = picks[i - 1 : i]
        if stored is not None:
            row = stored.index_select(0, last)[0]
        else:
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

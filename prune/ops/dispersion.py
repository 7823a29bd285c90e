"""Greedy dispersion from a given token: each pick is the token least like those picked before."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from . import cosine
from .fusing import fusable

Rule = Literal["max_sum", "k_center"]
"""Least like in sum over the picks, or least like the pick that it resembles most."""


def greedy_dispersion(features: Tensor, first: Tensor, count: int, rule: Rule) -> Tensor:
    """Pick `first` and `count - 1` more tokens by their cosine similarities to the picks so far.

    The sums or maxima are kept up to date, so that a pick costs O(N). Picks stay on the device: the
    host never waits, and a GPU makes all of them in one kernel. No token is picked twice, and ties
    go to the lower index.

    Args:
        features: (N, D), compared in float32.
        first: int64 scalar, a token.
        count: how many, 1 <= count <= N.

    Returns:
        (count,) int64 indices in the order of picking.
    """
    unit = normalize(features.float(), dim=-1)
    stored = cosine.gram(unit) if len(unit) <= cosine.STORE_UP_TO else None
    if stored is not None and fusable(stored):
        from . import fused  # Triton, which is there on a GPU only

        by_sum = rule == "max_sum"
        return fused.dispersion(stored[None], first.view(1), count, by_sum=by_sum)[0]
    likeness = unit.new_full((len(unit),), 0 if rule == "max_sum" else -torch.inf)
    picks = torch.empty(count, dtype=torch.int64, device=unit.device)
    picks[0] = first
    for i in range(1, count):
        last = picks[i - 1 : i]
        if stored is not None:
            row = stored.index_select(0, last)[0]
        else:
            row = unit @ unit.index_select(0, last)[0]
        if rule == "max_sum":
            likeness += row
        else:
            torch.maximum(likeness, row, out=likeness)
        likeness.index_fill_(0, last, torch.inf)  # for good: a pick is out of the race
        torch.argmin(likeness, dim=0, keepdim=True, out=picks[i : i + 1])
    return picks

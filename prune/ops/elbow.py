"""The elbow of a ranking: where a curve of falling values is farthest from its chord."""

from __future__ import annotations

import torch
from torch import Tensor


def elbow(values: Tensor) -> Tensor:
    """The value at the elbow of `values` (N,) in falling order: (1,) float64.

    The chord runs from the largest value at rank 0 to the smallest at rank N - 1. Of points that
    are equally far from it the first counts. For whole numbers the distances are exact.
    """
    ranked = values.double().sort(descending=True).values
    ranks = torch.arange(len(ranked), device=ranked.device)
    rise = ranked[-1] - ranked[0]
    distance = ((ranked - ranked[0]) * (len(ranked) - 1) - ranks * rise).abs()
    return ranked.gather(0, distance.argmax(0, keepdim=True))

"""DivPrune: at every step the distances of all earlier picks are gathered and reduced anew."""

from __future__ import annotations

import torch
from torch import Tensor

from .picture import Picture


def read(picture: Picture) -> None:
    return None


def choose(picture: Picture, scores: None, keep: int) -> Tensor:
    return max_min(picture.packed, keep).sort().values


def max_min(features: Tensor, keep: int) -> Tensor:
    """Picks (keep,) among features (N, D), in their order."""
    unit = features / features.norm(dim=-1, keepdim=True)
    distances = 1 - unit @ unit.T
    picks = torch.empty(keep, dtype=torch.int64)
    for step in range(keep):
        if step == 0:
            nearest = distances.topk(2, dim=0, largest=False).values[1]
        else:
            nearest = distances.index_select(0, picks[:step]).min(dim=0).values
        picks[step] = nearest.argmax()
    return picks

"""ToDRE, first stage (no released code): a product with the newest pick at every step."""

from __future__ import annotations

import torch
from torch import Tensor

from .picture import Picture

MAPS = (23,)


def read(picture: Picture, attention: Tensor) -> Tensor:
    """(P,): CLS attention of the last layer in the thumbnail, from the maps of all tiles."""
    return attention[:, :, 0, 1:].mean(1)[0]


def choose(picture: Picture, scores: Tensor, keep: int) -> Tensor:
    return max_sum(picture.packed, int(scores.argmax()), keep).sort().values


def max_sum(features: Tensor, pivot: int, keep: int) -> Tensor:
    """Picks (keep,) among features (N, D): least similar, in sum, to all picks before."""
    unit = features / features.norm(dim=-1, keepdim=True)
    sums = torch.zeros(len(features))
    picks = [pivot]
    while len(picks) < keep:
        sums += unit @ unit[picks[-1]]
        sums[picks[-1]] = torch.inf
        picks.append(int(sums.argmin()))
    return torch.tensor(picks)

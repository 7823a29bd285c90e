"""VTC-CLS: seven whole maps are averaged over heads before one row of each is taken."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .picture import Picture, in_order

MAPS = tuple(range(16, 23))


def read(picture: Picture, *maps: Tensor) -> Tensor:
    return summed_rows(maps)


def choose(picture: Picture, scores: Tensor, keep: int) -> Tensor:
    """The released code knows one tile; several are taken one by one."""
    per_tile = keep // picture.tiles
    mask = torch.zeros_like(scores, dtype=torch.bool)
    for tile, row in enumerate(scores):
        mask[tile, largest(row, per_tile)] = True
    return in_order(mask, picture.grid)


def summed_rows(maps: Sequence[Tensor]) -> Tensor:
    """(tiles, P) from a map (tiles, H, queries, S) per layer."""
    rows = [attention.mean(1)[:, 0, 1:] for attention in maps]
    return torch.stack(rows).sum(0)


def largest(scores: Tensor, keep: int) -> Tensor:
    return scores.topk(keep).indices.sort().values

"""FoPru (no released code): a whole map, its means along both axes, the one that varies more."""

from __future__ import annotations

import torch
from torch import Tensor

from .picture import Picture, in_order

MAPS = (22,)


def read(picture: Picture, attention: Tensor) -> Tensor:
    return significance(attention)


def choose(picture: Picture, scores: Tensor, keep: int) -> Tensor:
    mask = torch.zeros_like(scores, dtype=torch.bool)
    for tile, row in enumerate(scores):
        mask[tile, row.topk(keep // picture.tiles).indices] = True
    return in_order(mask, picture.grid)


def significance(attention: Tensor) -> Tensor:
    """(tiles, P) from whole maps (tiles, H, S, S), CLS left out on both axes."""
    mean = attention.mean(1)[:, 1:, 1:]
    given, received = mean.mean(2), mean.mean(1)
    varies_more = given.var(-1, keepdim=True) > received.var(-1, keepdim=True)
    return torch.where(varies_more, given, received)

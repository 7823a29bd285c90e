"""CLS attention, top k: one whole map for its first row."""

from __future__ import annotations

import torch
from torch import Tensor

from .picture import Picture, in_order

MAPS = (22,)


def read(picture: Picture, attention: Tensor) -> Tensor:
    return attention[:, :, 0, 1:].mean(1)


def choose(picture: Picture, scores: Tensor, keep: int) -> Tensor:
    top = scores.topk(keep // picture.tiles, dim=-1).indices
    mask = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, top, True)
    return in_order(mask, picture.grid)

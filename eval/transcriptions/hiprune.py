"""HiPrune: two whole attention maps are averaged over heads and queries for two vectors."""

from __future__ import annotations

import torch
from torch import Tensor

from .picture import SIDE, Picture, in_order

MAPS = (8, 22)


def read(picture: Picture, objects: Tensor, deep: Tensor) -> tuple[Tensor, Tensor]:
    return received(objects), received(deep)


def choose(picture: Picture, scores: tuple[Tensor, Tensor], keep: int) -> Tensor:
    per_tile = keep // picture.tiles
    masks = [anchors_and_registers(o, d, SIDE, per_tile) for o, d in zip(*scores, strict=True)]
    return in_order(torch.stack(masks), picture.grid)


def received(attention: Tensor) -> Tensor:
    """(tiles, P) from maps (tiles, H, queries, S): every query counts, CLS among them."""
    return attention.mean(1).mean(1)[:, 1:]


def anchors_and_registers(
    objects: Tensor, deep: Tensor, columns: int, keep: int, alpha: float = 0.1
) -> Tensor:
    """Mask of what stays of one tile, from its two vectors (N,).

    Taking 1 off the scores of anchors and neighbours puts them last where scores are means; where
    they are sums it does not, and fewer than `keep` stay.
    """
    anchors = objects.topk(round(keep * alpha / 5)).indices
    neighbours = [anchors + step for step in (0, -1, 1, -columns, columns)]
    certain = torch.cat(neighbours).clamp(0, len(objects) - 1).unique()
    rest = deep.clone()
    rest[certain] -= 1
    registers = rest.topk(keep - len(certain)).indices
    mask = torch.zeros(len(objects), dtype=torch.bool)
    mask[certain] = True
    mask[registers] = True
    return mask

"""VisPruner: dozens of rounds, each with a product of all features that are left."""

from __future__ import annotations

import torch
from torch import Tensor

from .picture import Picture, in_order

MAPS = (22,)


def read(picture: Picture, attention: Tensor) -> Tensor:
    return attention[:, :, 0, 1:].mean(1)


def choose(picture: Picture, scores: Tensor, keep: int) -> Tensor:
    mask = important_and_diverse(picture.hidden[:, 1:], scores, keep // picture.tiles)
    return in_order(mask, picture.grid)


def important_and_diverse(
    features: Tensor, attention: Tensor, keep: int, important_ratio: float = 0.5
) -> Tensor:
    """Mask (tiles, P) from features (tiles, P, C) and CLS attention (tiles, P)."""
    tiles = len(features)
    of_tile = torch.arange(tiles)[:, None]
    important = int(keep * important_ratio)
    ranked = attention.argsort(dim=-1, descending=True)
    left, residual = ranked[:, :important], ranked[:, important:]
    unit = features / features.norm(dim=-1, keepdim=True)
    diverse = keep - important
    while diverse > 0:
        drop = min(8, residual.shape[1] - diverse)
        if drop <= 0:
            break
        here, there = residual[:, 0::2], residual[:, 1::2]
        similar = unit[of_tile, here] @ unit[of_tile, there].transpose(1, 2)
        alike = similar.max(dim=-1).values.argsort(dim=-1, descending=True)
        residual = torch.cat([here[of_tile, alike[:, drop:]], there], dim=1)
    mask = torch.zeros(attention.shape, dtype=torch.bool)
    mask.scatter_(1, left, True)
    if diverse > 0:
        mask.scatter_(1, residual, True)
    return mask

"""CDPruner: a greedy determinant whose every step multiplies out all rows found so far."""

from __future__ import annotations

import torch
from torch import Tensor

from .picture import Picture, in_order


def read(picture: Picture) -> None:
    return None


def choose(picture: Picture, scores: None, keep: int) -> Tensor:
    features, image, text = picture.features, picture.clip_image, picture.clip_text
    picks = greedy_map(kernel(features, image, text), keep // picture.tiles)
    mask = torch.zeros(features.shape[:2], dtype=torch.bool).scatter_(1, picks, True)
    return in_order(mask, picture.grid)


def kernel(features: Tensor, image: Tensor, text: Tensor) -> Tensor:
    """(tiles, P, P) from features (tiles, P, D), image (tiles, P, .) and text (segments, .)."""
    unit = (features / features.norm(dim=-1, keepdim=True)).float()
    similar = unit @ unit.transpose(1, 2)
    image = image / image.norm(dim=-1, keepdim=True)
    text = text / text.norm(dim=-1, keepdim=True)
    relevance = (-(image @ text.T)).mean(-1)
    low, high = relevance.min(), relevance.max()
    relevance = (relevance - low + 1e-6) / (high - low)
    return relevance[:, :, None] * similar * relevance[:, None, :]


def greedy_map(kernels: Tensor, keep: int) -> Tensor:
    """Picks (tiles, keep) of each kernel (tiles, P, P), in their order."""
    tiles, patches, _ = kernels.shape
    of_tile = torch.arange(tiles)
    rows = torch.zeros(keep, tiles, patches)
    gains = kernels.diagonal(dim1=1, dim2=2).clone()
    picks = torch.empty(keep, tiles, dtype=torch.int64)
    for step in range(keep):
        best = gains.argmax(-1)
        picks[step] = best
        known = torch.einsum("tb,tbn->bn", rows[:step, of_tile, best], rows[:step])
        row = (kernels[of_tile, best] - known) / gains[of_tile, best].sqrt()[:, None]
        rows[step] = row
        gains -= row.square()
        gains[of_tile, best] = -torch.inf
    return picks.T

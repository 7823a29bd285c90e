"""PruMerge+: as PruMerge, with tokens at regular steps added one by one if they are new."""

from __future__ import annotations

import torch
from torch import Tensor

from .picture import Picture
from .prumerge import merged, outliers
from .prumerge import read as read

MOVES_ROWS = True


def choose(picture: Picture, scores: tuple[Tensor, Tensor], keep: int) -> Tensor:
    """Tiles one by one; a third of the count by attention and the rest by regular steps, near the
    counts that are known of a released variant with a fixed budget (40 and every 6th for 128)."""
    per_tile = keep // picture.tiles
    rows = []
    for tile, (attention, key) in enumerate(zip(*scores, strict=True)):
        count = per_tile // 3
        kept = with_samples(attention.topk(count).indices, len(attention) // (per_tile - count))
        rows.append(merged(picture.hidden[tile, 1:], key[1:], attention, kept))
    return torch.cat(rows)


def adaptive(attention: Tensor) -> Tensor:
    """The published rule: outliers and samples whose step follows from their share."""
    kept = outliers(attention)
    ratio = len(kept) / len(attention)
    return with_samples(kept, int(int(1 / ratio) / 3))


def with_samples(kept: Tensor, step: int) -> Tensor:
    """Indices (K,) and every `step`-th that is not among them; the last patch is never sampled."""
    added = [i for i in range(0, 575, step) if i not in kept]
    return torch.cat([kept, torch.tensor(added, dtype=kept.dtype)])

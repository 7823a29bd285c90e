"""VisionZip: a whole map for the row of CLS; the rest is grouped by a product with one-hot rows."""

from __future__ import annotations

import torch
from torch import Tensor

from .picture import Picture

MAPS = (22,)
MOVES_ROWS = True


def read(picture: Picture, attention: Tensor) -> tuple[Tensor, Tensor]:
    """The CLS row summed over heads (tiles, P), and the keys averaged over heads (tiles, S, .)."""
    return cls_sum(attention), picture.keys[22].mean(1)


def choose(picture: Picture, scores: tuple[Tensor, Tensor], keep: int) -> Tensor:
    per_tile = keep // picture.tiles
    contextual = round(per_tile * 10 / 64)  # the released split: 54 and 10 of 64
    rows = zipped(*scores, picture.hidden, per_tile - contextual, contextual)[1]
    return rows.flatten(0, 1)


def cls_sum(attention: Tensor) -> Tensor:
    """(tiles, P) from maps (tiles, H, queries, S)."""
    return attention[:, :, 0, 1:].sum(1)


def zipped(
    scores: Tensor, metric: Tensor, hidden: Tensor, dominant: int, contextual: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Per tile: positions (dominant,) that stay, CLS first; rows; positions of the group centres.

    Args:
        scores: (tiles, P).
        metric: (tiles, S, .) keys, CLS among them as in `hidden` (tiles, S, C).
    """
    tiles, length, width = hidden.shape
    top = scores.topk(dominant - 1, dim=1).indices + 1
    picked = torch.cat([torch.zeros(tiles, 1, dtype=torch.int64), top], dim=1)
    rest = torch.ones(tiles, length, dtype=torch.bool).scatter_(1, picked, False)
    stay = hidden.masked_select(~rest[..., None]).view(tiles, dominant, width)
    left = hidden.masked_select(rest[..., None]).view(tiles, -1, width)
    keys = metric[rest].view(tiles, -1, metric.shape[-1])
    keys = keys / keys.norm(dim=-1, keepdim=True)
    count = keys.shape[1]
    step = max(1, count // contextual)
    centres = torch.arange(0, count, step)[:contextual]
    others = torch.ones(count, dtype=torch.bool).index_fill_(0, centres, False)
    similar = keys[:, others] @ keys[:, centres].transpose(1, 2)
    belongs = torch.zeros(tiles, count - contextual, contextual)
    belongs.scatter_(2, similar.argmax(2, keepdim=True), 1)
    sizes = belongs.sum(1).clamp(min=1)[..., None]
    means = belongs.transpose(1, 2) @ left[:, others] / sizes
    positions = torch.arange(length).expand(tiles, -1)
    return (
        positions[~rest].view(tiles, dominant),
        torch.cat([stay, left[:, centres] + means], dim=1),
        positions[rest].view(tiles, count)[:, centres],
    )

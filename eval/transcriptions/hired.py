"""HiRED: the whole softmax of two layers is computed again for the row of one query each."""

from __future__ import annotations

import torch
from torch import Tensor

from .picture import Picture, attention_map, canvas, in_order, unpadded


def read(picture: Picture) -> tuple[Tensor, Tensor]:
    first, late = (cls_rows(picture, layer) for layer in (0, 22))
    return first, late


def choose(picture: Picture, scores: tuple[Tensor, Tensor], keep: int) -> Tensor:
    first, late = scores
    rate = (keep + 0.5) / late.numel()  # a hair more, so that rounding down gives the count itself
    if picture.tiles == 1:
        return single(late[0], rate)
    return in_order(tiled(first, late, rate), picture.grid)


def cls_rows(picture: Picture, layer: int) -> Tensor:
    """(tiles, P): attention of CLS, summed over heads."""
    return attention_map(picture.queries[layer], picture.keys[layer])[:, :, 0, 1:].sum(1)


def single(late: Tensor, rate: float) -> Tensor:
    """A plain image: scores (P,), top share."""
    count = min(len(late), int(len(late) * rate))
    mask = torch.zeros(len(late), dtype=torch.bool)
    mask[late.topk(count).indices] = True
    return mask.nonzero()[:, 0]


def tiled(first: Tensor, late: Tensor, rate: float, alpha: float = 0.5) -> Tensor:
    """Mask (tiles, P) from the scores (tiles, P) of an early and a late layer."""
    tiles, patches = late.shape
    total = int(tiles * patches * rate)
    for_thumbnail = min(int(total * alpha), patches)
    for_crops = min(total - for_thumbnail, (tiles - 1) * patches)
    mask = torch.zeros(tiles, patches, dtype=torch.bool)
    mask[0, late[0].topk(for_thumbnail).indices] = True
    if for_crops > 0:
        for tile, count in enumerate(crop_counts(first[0], tiles - 1, for_crops, alpha), 1):
            mask[tile, late[tile].topk(count).indices] = True
    return mask


def crop_counts(first: Tensor, crops: int, total: int, alpha: float) -> list[int]:
    """How many tokens each crop gets: by marks in strips of the thumbnail."""
    marked = torch.zeros(len(first), dtype=torch.bool)
    marked[first.topk(int(len(first) * (1 - alpha))).indices] = True
    marks = marked.view(crops, -1).sum(1)
    shares = marks.float() / marks.sum()
    return [min(int(share * total), len(first)) for share in shares]


def packed(mask: Tensor, grid: tuple[int, int], image_size: tuple[int, int]) -> Tensor:
    """Ids of the kept patches as the released code lines them up: rows and columns of crops are
    swapped, and what falls into the padding of that canvas is lost. All sizes (height, width)."""
    rows, columns = grid[::-1]
    ids = torch.arange(mask.numel()).view(mask.shape)
    joined, marks = canvas(ids[1:], (rows, columns)), canvas(mask[1:], (rows, columns))
    inside = unpadded(joined.shape[0], joined.shape[1], *image_size)
    return torch.cat([ids[0][mask[0]], joined[inside][marks[inside]]])

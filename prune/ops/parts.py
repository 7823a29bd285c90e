"""The parts of an image (tiles, chunks): how many tokens each one keeps, and its best ones.

Nothing here waits for the device: counts that depend on tensors stay tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from ..tiling import Block, Tiling
from .topk import top_k

_LEAST = 1e-300  # in place of a divisor of zero
_NOISE = 1e-9  # of quotas in float64


def apportion(
    total: int, weights: Tensor, sizes: Sequence[int], priority: Tensor | None = None
) -> Tensor:
    """`total` in whole numbers proportional to `weights`, none above its size.

    What a full part cannot take goes to the others by weight; parts of weight zero come last, by
    the room they have. What is left by rounding down goes to the largest remainders.

    Args:
        total: 0 <= total <= sum(sizes).
        weights: (G,), at least 0.
        sizes: tokens of each part.
        priority: (G,) who is first to get what is left by rounding down, in place of remainders.

    Returns:
        (G,) int64, with the sum `total`. Ties go to the lower index.
    """
    weights = weights.double()
    room = on_device(sizes, weights.device).double()
    quotas = _level(total, weights, room)
    spare = room - quotas
    left = (total - quotas.sum()).clamp_min(0)
    quotas = quotas + left * spare / spare.sum().clamp_min(_LEAST)

    counts = (quotas + _NOISE).floor()
    first = (quotas - counts).round(decimals=6) if priority is None else priority.double()
    first = first.masked_fill(counts >= room, -torch.inf)
    place = first.argsort(descending=True, stable=True).argsort()
    return (counts + (place < total - counts.sum())).long()


def _level(total: int, weights: Tensor, room: Tensor) -> Tensor:
    """Quotas min(room, level * weight) with the sum `total`, as far as the weights reach.

    With the parts sorted by when they fill up, the sum at a level is the least of the lines "the
    first i parts are full, the others grow": the level is the largest at which one meets `total`.
    """
    order = (room / weights.clamp_min(_LEAST)).argsort(stable=True)
    full = room[order].cumsum(0) - room[order]
    growing = weights[order].flip(0).cumsum(0).flip(0)
    level = ((total - full) / growing.clamp_min(_LEAST)).amax()
    return torch.minimum(room, level * weights)


def top_of_each(scores: Tensor, parts: Tensor, counts: Tensor, total: int) -> Tensor:
    """The best tokens of each part: part after part, the best first.

    Args:
        scores: (N,).
        parts: (N,) the number of each token's part.
        counts: (G,) how many of each part, none above its size.
        total: the sum of `counts`.

    Returns:
        (total,) int64. Ties go to the lower index.
    """
    best = top_k(scores, len(scores))
    order = best[parts[best].argsort(stable=True)]
    part = parts[order]
    starts = torch.searchsorted(part, torch.arange(len(counts), device=part.device))
    rank = torch.arange(len(part), device=part.device) - starts[part]
    out = (rank >= counts[part]).to(torch.uint8)
    return order[out.argsort(stable=True)[:total]]


def on_device(values: Sequence[int] | Tensor, device: torch.device) -> Tensor:
    """Whole numbers of the host on the device, without waiting for it."""
    return torch.as_tensor(values, dtype=torch.int64).to(device, non_blocking=True)


def by_tile(tiling: Tiling, device: torch.device) -> Tensor:
    """The patches of the first tile, of the next, and so on: (P,) int64 numbers."""
    return on_device(_by_tile(tiling), device)


def tile_numbers(tiling: Tiling, device: torch.device) -> Tensor:
    """The tile of each patch, in the order of `tiling.tiles`: (P,) int64."""
    return on_device(_tile_numbers(tiling), device)


@lru_cache(maxsize=256)
def _by_tile(tiling: Tiling) -> Tensor:
    return torch.cat(list(tiling.tile_patches(torch.device("cpu"))))


@lru_cache(maxsize=256)
def _tile_numbers(tiling: Tiling) -> Tensor:
    sizes = torch.tensor([tile.num_patches for tile in tiling.tiles])
    return torch.arange(len(sizes)).repeat_interleave(sizes)[_by_tile(tiling).argsort()]


def canvas_of(tiling: Tiling) -> Block | None:
    """The canvas of several crops where the first tile is a thumbnail of it, else None: also where
    it is not known how the crops lie on it."""
    return tiling.blocks[1] if tiling.whole == 0 and len(tiling.blocks) == 2 else None


def sums_of_crops(
    thumbnail: Tensor, row_sizes: Sequence[int], column_sizes: Sequence[int]
) -> Tensor:
    """Sum of a map of the thumbnail (rows, columns) over the region of each crop: (crops,) float64.

    The thumbnail shows the canvas that the crops make up; the sizes are those of its rows and
    columns of tiles. A cell on the border between crops counts for each by its share of the area.
    """
    rows, columns = (
        _overlap(cells, sizes).to(thumbnail.device)
        for cells, sizes in zip(thumbnail.shape, (row_sizes, column_sizes), strict=True)
    )
    return (rows @ thumbnail.double() @ columns.T).flatten()


def _overlap(cells: int, sizes: Sequence[int]) -> Tensor:
    """How much of each of `cells` equal cells lies in each part of a line: (parts, cells)."""
    edges = [cells * edge / sum(sizes) for edge in (0, *accumulate(sizes))]
    spans = [span for span in pairwise(edges) if span[0] < span[1]]
    low, high = torch.tensor(spans, dtype=torch.float64).unsqueeze(-1).unbind(1)
    start = torch.arange(cells, dtype=torch.float64)
    return (torch.minimum(start + 1, high) - torch.maximum(start, low)).clamp_min(0)

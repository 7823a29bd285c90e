"""Windows of a grid: rectangles of tokens without overlap."""

from __future__ import annotations

from functools import lru_cache
from itertools import product

import torch
from torch import Tensor


@lru_cache(maxsize=64)
def of_size(grid: tuple[int, int], size: tuple[int, int]) -> tuple[tuple[int, ...], ...]:
    """The tokens of each window of `size` rows and columns, all as many numbers.

    Windows at the end of a side may be smaller: they are filled up with -1 from the front, so that
    the last number of each is its token at the bottom right.
    """
    firsts = product(range(0, grid[0], size[0]), range(0, grid[1], size[1]))
    found = []
    for top, left in firsts:
        rows = range(top, min(grid[0], top + size[0]))
        columns = range(left, min(grid[1], left + size[1]))
        tokens = [row * grid[1] + column for row, column in product(rows, columns)]
        found.append((*[-1] * (size[0] * size[1] - len(tokens)), *tokens))
    return tuple(found)


def whole(grid: tuple[int, int], size: int) -> tuple[int, int]:
    """How many windows of `size` x `size` there are along each side, at least one."""
    return max(1, grid[0] // size), max(1, grid[1] // size)


@lru_cache(maxsize=64)
def numbers_of(grid: tuple[int, int], size: int) -> tuple[int, ...]:
    """The window of each token. Windows are `size` x `size`; rows and columns beyond the last
    whole one belong to it."""
    high, wide = whole(grid, size)
    rows, columns = (
        [min(i // size, n - 1) for i in range(side)]
        for side, n in zip(grid, (high, wide), strict=True)
    )
    return tuple(row * wide + column for row, column in product(rows, columns))


def ranks(scores: Tensor, windows: Tensor) -> Tensor:
    """The place of each token in its window by falling score, 0 first: (B, N).

    Equal scores rank by index.

    Args:
        scores: (B, N).
        windows: (B, N) int64, as `numbers_of` says.
    """
    place = torch.arange(scores.shape[1], device=scores.device).expand_as(scores)
    by_score = scores.float().sort(dim=1, descending=True, stable=True).indices
    window, order = windows.gather(1, by_score).sort(dim=1, stable=True)
    first = torch.searchsorted(window, window)
    return torch.empty_like(place).scatter(1, by_score.gather(1, order), place - first)

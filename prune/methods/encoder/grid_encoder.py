"""grid_encoder: in three blocks of the encoder an even pattern of rows stays, blind to content.

Reference: none; the usual baseline of regular subsampling, inside the encoder.
Upstream: none.
Differs: nothing to differ from. Rows leave in the order of an ordered-dither (Bayer) pattern, so
    that every count is spread evenly and lies within each larger one: a half is a chessboard, a
    quarter every second row and column. Where pictures have no grid, every second number and so on.
    Cuts and counts are those of EViT under a budget.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...blocks import FewCuts
from ...contract import EncoderRows, Reduction
from ...ops.topk import ascending
from ...registry import register

_BITS = 24
"""Of the number of a row that has no grid, below 2^24."""


@register("grid_encoder")
@dataclass(frozen=True, kw_only=True)
class GridEncoder(FewCuts):
    """The rows that come first in the pattern."""

    def reduce(self, rows: EncoderRows, keep: int) -> Reduction:
        order = _pattern(rows.numbers, rows.grid).argsort(dim=1, stable=True)
        return Reduction(source=ascending(order[:, :keep]))


def _pattern(numbers: Tensor, grid: tuple[int, int] | None) -> Tensor:
    """When each place is used: the lowest bits of its row and its column say most."""
    high, wide, bits = torch.zeros_like(numbers), numbers, _BITS
    if grid is not None:
        high, wide, bits = numbers // grid[1], numbers % grid[1], max(grid).bit_length()
    order = torch.zeros_like(numbers)
    for bit in range(bits):
        one, other = (high ^ wide) >> bit & 1, high >> bit & 1
        order = order << 2 | one << 1 | other
    return order

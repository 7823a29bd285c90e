"""Pool: average the projected features over the cells of a regular grid, blind to their content.

Reference: none; the usual baseline of average pooling, made exact for every count.
Upstream: none.
Differs: equal to an average pooling of k x k where the count divides the grid so. Elsewhere the
    rows are split into bands as evenly as whole numbers allow, and each band into columns of its
    own number, so that cells stay about square.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from ...contract import BeforeLLM, Features, ModelShape, Selection, Signal, VisualTokens
from ...ops.merge import bags
from ...ops.spread import even_shares, lattice_rows
from ...registry import register


@register("pool")
@dataclass(frozen=True, kw_only=True)
class Pool(BeforeLLM):
    """Each kept token is the mean of a rectangle of tokens, and stands in its middle."""

    needs_grid: ClassVar[bool] = True
    unranked: ClassVar[str | None] = "averages regular cells, whatever the image shows"

    def needs(self, shape: ModelShape) -> tuple[Signal, ...]:
        return (Features(),)

    def select(self, tokens: VisualTokens, keep: int) -> Selection:
        features = tokens.signals[Features()]
        cells = _Cells(*(part.to(features.device) for part in _cells(*tokens.grid, keep)))
        return Selection(
            kept=cells.middles.clone(),
            features=bags(features, cells.members, cells.starts),
            projected=True,
            groups=torch.stack([cells.owners, cells.members]),
        )


class _Cells(NamedTuple):
    """A partition of the grid into K rectangles, numbered in reading order."""

    middles: Tensor
    """(K,), ascending: the member nearest the centre, the upper left one of several."""
    members: Tensor
    """(N,): the tokens, cell by cell."""
    owners: Tensor
    """(N,): the cell of each member."""
    starts: Tensor
    """(K,): where each cell begins in `members`."""


@lru_cache(maxsize=256)
def _cells(rows: int, columns: int, count: int) -> _Cells:
    bands = lattice_rows(count, rows, columns)
    heights, in_band = even_shares(rows, bands), even_shares(count, bands)
    middles, labels = [], []
    for top, height, number, first in zip(
        [0, *accumulate(heights)], heights, in_band, [0, *accumulate(in_band)], strict=False
    ):
        widths = torch.tensor(even_shares(columns, number))
        lefts = widths.cumsum(0) - widths
        middles.append((top + (height - 1) // 2) * columns + lefts + (widths - 1) // 2)
        cells = torch.arange(first, first + number).repeat_interleave(widths)
        labels.append(cells.repeat(height))  # the same in each row of the band
    owners, members = torch.cat(labels).sort(stable=True)
    starts = torch.searchsorted(owners, torch.arange(count))
    return _Cells(torch.cat(middles), members, owners, starts)

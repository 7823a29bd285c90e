"""Shortening sequences: which columns of a padded batch stay, and how tensors follow them.

A batch of L columns is shortened to rows that are right-aligned (padded on the left), because
generation reads the last column. All functions are pure; there is no loop over tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """A shortened batch: `keep` (B, L) bool marks the columns of the full batch that are alive.

    `counts` has the tokens of each row. The shortened batch has as many columns as its longest row.
    """

    keep: Tensor
    counts: list[int]

    @classmethod
    def of(cls, keep: Tensor) -> Layout:
        """The layout that holds exactly the marked columns; the host waits for their counts."""
        return cls(keep, keep.sum(1).tolist())

    @property
    def length(self) -> int:
        """Columns of the shortened batch."""
        return max([1, *self.counts])

    @cached_property
    def columns(self) -> Tensor:
        """Column of the full batch behind each column of the shortened one: (B, length)."""
        order = torch.argsort(self.keep.to(torch.uint8), dim=1, stable=True)
        return order[:, -self.length :]

    @cached_property
    def valid(self) -> Tensor:
        """Which columns of the shortened batch are tokens rather than padding: (B, length)."""
        return self.keep.gather(1, self.columns)

    @cached_property
    def padding(self) -> Tensor | None:
        """`valid`, or `None` where every column is a token."""
        return None if min(self.counts) == self.length else self.valid

    @cached_property
    def place(self) -> Tensor:
        """Column of the shortened batch that holds the last token alive at or before each column
        of the full batch: (B, L). Columns before the first such token get the first."""
        rank = self.keep.cumsum(1)
        first = self.length - rank[:, -1:]
        return (first + rank - 1).clamp_min(first).clamp_max(self.length - 1)

    def shorten(self, full: Tensor, dim: int = 1) -> Tensor:
        """Gather a tensor of the full batch; batch is the dimension before `dim`."""
        return _gather(full, self.columns, dim)

    def then(self, later: Layout) -> Tensor:
        """Columns of this shortened batch that survive in `later`: (B, later.length)."""
        return self.place.gather(1, later.columns)

    def restore(self, short: Tensor) -> Tensor:
        """Back to the full length (B, L, D): each column shows the last token at or before it."""
        return _gather(short, self.place, 1)


def _gather(tensor: Tensor, columns: Tensor, dim: int) -> Tensor:
    """`tensor[..., b, columns[b, j], ...]` with the batch in dimension `dim - 1`."""
    columns = columns.to(tensor.device)
    if tensor.shape[dim - 1] != columns.shape[0]:  # one row for the whole batch
        sizes = list(tensor.shape)
        sizes[dim - 1] = columns.shape[0]
        tensor = tensor.expand(sizes)
    rows = torch.arange(len(columns), device=columns.device)[:, None]
    return tensor[(slice(None),) * (dim - 1) + (rows, columns)]


def gather_columns(tensor: Tensor, columns: Tensor) -> Tensor:
    """Columns (B, K) of a (B, L, ...) tensor; a (1, L, ...) tensor serves every row."""
    return _gather(tensor, columns, 1)


def stored_columns(stored: Tensor, columns: Tensor) -> Tensor:
    """Columns (B, K) of keys or values (B, H, S, D_head): (B, H, K, D_head)."""
    batch_size, heads, length, width = stored.shape
    first = torch.arange(batch_size * heads, device=columns.device).view(batch_size, heads, 1)
    # Whole entries are taken several times faster from a flat list than by three indices.
    index = (first * length + columns[:, None]).flatten()
    return stored.reshape(-1, width).index_select(0, index).view(batch_size, heads, -1, width)


def by_token(values: Tensor, tokens: Tensor, count: int) -> Tensor:
    """Values of rows (K,) as those of `count` tokens: NaN where no row is that token; rows that are
    no token (-1) have no place."""
    number = tokens.where(tokens >= 0, count)
    return values.new_full((count + 1,), torch.nan).index_copy(0, number, values)[:count]

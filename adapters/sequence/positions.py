"""Position ids of a prefill's columns, while rows leave and move.

`original`: a row keeps the position of the token that it is. `repacked`: positions follow the rows,
and close up behind those that left.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .layout import Layout, gather_columns
from .placed import PlacedImage


class PositionIds:
    """Positions of all columns of the caller's sequence, in the current layer.

    What earlier turns closed up is in `Segment.shift`; it comes off where tables are made.
    """

    given: Tensor
    """(B | 1, L) or (axes, B, L): the caller's."""
    now: Tensor
    """Like `given`: the position that the token of each column has."""
    gone: Tensor | None
    """(B, L): how many positions were closed up before each column; None: none."""
    source: Tensor | None
    """(B, L): the caller's column whose token is in each column; None: its own."""

    def __init__(
        self, given: Tensor, images: Sequence[PlacedImage], real: Tensor, closed: Tensor | None
    ) -> None:
        """
        Args:
            real: (B, L) bool, no padding.
            closed: (B, L) bool, columns that are alive, where positions close up before the first
                layer; None: they do not.
        """
        self.given, self._real = given, real
        self.source = _moved(images, *real.shape)
        self.gone = None
        if closed is not None:  # re-packed positions follow the rows, whatever tokens they are
            self.close_up(closed)
        else:
            self.now = given if self.source is None else _gathered(given, self.source)

    def close_up(self, keep: Tensor) -> None:
        """Number the columns in `keep` (B, L) without gaps."""
        self.gone = (self._real & ~keep).cumsum(1)
        self.now = self.given - self.gone

    @property
    def closed(self) -> Tensor | None:
        """(B, 1): how many positions were closed up in all; None: none."""
        return None if self.gone is None else self.gone[:, -1:]

    def move(self, source: Tensor) -> None:
        """The token of each column is the one that was in column `source` (B, L)."""
        self.source = source if self.source is None else self.source.gather(1, source)
        self.now = _gathered(self.now, source)

    def at(self, layout: Layout, shift: Tensor | None) -> Tensor:
        """Those of a shortened batch: (B, K) or (axes, B, K).

        Args:
            shift: (B, 1), all that was closed up in the layer's segment, now and earlier.
        """
        ids = self.now
        if shift is not None:
            ids = ids - (shift - (0 if self.closed is None else self.closed))
        return layout.shorten(ids, ids.dim() - 1)

    def entering(self, first: Layout, earlier: Tensor | None) -> Tensor:
        """What the text model is given: (B, K), or (3 | 4, B, K) for M-RoPE.

        Args:
            earlier: (B, 1), what earlier turns closed up.
        """
        ids = self.now if earlier is None else self.now - earlier
        short = first.shorten(ids, dim=ids.dim() - 1)
        if len(short) == 4 and short.dim() == 3:
            # Row 0 only tells packed sequences: it must have no gaps.
            gone = (self._real & ~first.keep).cumsum(1)
            short = torch.cat([first.shorten(self.given[0] - gone)[None], short[1:]])
        return short

    def span(self) -> tuple[Tensor, Tensor] | None:
        """(B, 1) each, the caller's positions of the first token and of the next one; None for
        M-RoPE."""
        if self.given.dim() > 2:
            return None
        ids = self.given.expand_as(self._real)
        first = ids.masked_fill(~self._real, torch.iinfo(ids.dtype).max).amin(1, keepdim=True)
        return first, ids.masked_fill(~self._real, -1).amax(1, keepdim=True) + 1


def _moved(images: Sequence[PlacedImage], batch: int, length: int) -> Tensor | None:
    """(B, L) the column whose token is in each column; None where every token is in its own."""
    moved = [image for image in images if image.order is not None]
    if not moved:
        return None
    columns = torch.arange(length, device=moved[0].columns.device).repeat(batch, 1)
    for image in moved:
        slots = image.columns[image.slots]
        columns[image.rows[:, None], slots] = image.columns[image.encoded.sources]
    return columns


def _gathered(ids: Tensor, columns: Tensor) -> Tensor:
    """Position ids of the tokens in `columns` (B, L)."""
    if ids.dim() == 2:
        return gather_columns(ids, columns)
    return torch.stack([gather_columns(axis, columns) for axis in ids])

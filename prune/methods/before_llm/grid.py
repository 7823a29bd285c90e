"""Grid: keep an evenly spread subset of the image's grid, blind to its content.

Reference: none; the usual baseline of regular subsampling, made exact for every count.
Upstream: none.
Differs: nothing to differ from. Counts that form no regular lattice are spread over rows and
    columns as evenly as whole numbers allow; beyond a quarter of the tokens every row is used, and
    odd rows are shifted by half a step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ...contract import BeforeLLM, ModelShape, Selection, Signal, VisualTokens
from ...ops.spread import even_shares, lattice_rows
from ...registry import register


@register("grid")
@dataclass(frozen=True, kw_only=True)
class Grid(BeforeLLM):
    """Rows spread evenly over the image, tokens spread evenly over each row."""

    needs_grid: ClassVar[bool] = True
    unranked: ClassVar[str | None] = "keeps a lattice, whatever the image shows"

    def needs(self, shape: ModelShape) -> tuple[Signal, ...]:
        return ()

    def select(self, tokens: VisualTokens, keep: int) -> Selection:
        rows, columns = tokens.grid
        used = lattice_rows(keep, rows, columns)
        shifts = (2, 2)  # quarters of a step before a row's first token
        if 4 * keep > rows * columns and 1 < rows <= keep:
            used, shifts = rows, (1, 3)
        kept = []
        for i, in_row in enumerate(even_shares(keep, used)):
            start = columns * ((2 * i + 1) * rows // (2 * used))
            steps = (4 * j + shifts[i % 2] for j in range(in_row))
            kept += [start + step * columns // (4 * in_row) for step in steps]
        return Selection(kept=torch.tensor(kept))

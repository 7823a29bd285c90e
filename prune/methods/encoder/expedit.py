"""Expedit: the deep blocks of the encoder run on centres of clusters, then all rows come back.

Reference: Expediting Large-Scale Vision Transformer for Dense Prediction without Fine-tuning,
    NeurIPS 2022, arXiv 2210.01035.
Upstream: Expedit-LargeScale-Vision-Transformer/Expedit-SAM, segment_anything/modeling/
    hourglass_image_encoder.py (TokenClusteringBlock, TokenReconstructionBlock),
    commit 75a1c30d66ad66999cb80fdfc85829f7e71dcacf.
Differs: the whole picture is one grid (official: each window of SAM's encoder has its own), and
    windowed and rotary encoders are refused. The count is the budget's, on the grid that is most
    like the picture's, at most twice as long or as wide as that (official: 10 x 10 for windows of
    14 x 14). Block 14 of 32 is scaled to other depths (official: 6, 8, 14 or 18). Rows come back
    behind the last block that the projector reads. Weights to restore them are counted from the
    nearest centre, which their unit length cancels: rows far from all centres do not vanish.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import count
from typing import ClassVar

from torch import Tensor

from ...blocks import seeing_all
from ...contract import BlockCut, BlockInput, EncoderRows, InEncoder, Reduction, Signal, Tower
from ...errors import (
    BudgetError,
    MethodFieldError,
    UnsupportedFeatureError,
    UnsupportedModelError,
)
from ...fields import check_int, check_layer, check_number
from ...layers import scale_layer, user_layer
from ...ops.centres import clustered, restored
from ...registry import register

_BLOCK, _DEPTH = 14, 32
_LONGEST = 2
"""How many times longer or wider than the picture's a grid of centres may be, for its count."""


@register("expedit")
@dataclass(frozen=True, kw_only=True)
class Expedit(InEncoder):
    """In front of block `layer` rows become means around a regular grid of centres; behind the last
    block each row is a mix of the nearest centres, and the LLM sees all tokens.

    `layer`: None for the paper's. `rounds` of clustering, each row among the centres of `window` x
    `window` cells; `temperature` multiplies squared distances; a row is restored from the `nearest`
    centres.
    """

    restores: ClassVar[bool] = True

    layer: int | None = None
    rounds: int = 5
    temperature: float = 0.01
    window: int = 5
    nearest: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        check_layer("layer", self.layer)
        check_number("temperature", self.temperature, positive=True)
        for field in ("rounds", "window", "nearest"):
            hint = "give a whole number, at least 1"
            check_int(field, getattr(self, field), at_least=1, hint=hint)
        if self.window % 2 == 0:
            raise MethodFieldError(
                f"window={self.window} is not possible: give an odd number of cells, so that a "
                f"row's own is in the middle."
            )

    def blocks(self, tower: Tower) -> tuple[BlockCut, ...]:
        if tower.full_attention is not None or tower.rotary:
            raise UnsupportedModelError(
                f"{self.name} puts centres of clusters in the place of patches, which windowed and "
                f"rotary encoders cannot place: use evit or tome."
            )
        allowed, depth = seeing_all(tower), tower.num_layers
        if self.layer is not None:
            return (BlockCut(user_layer(self.layer, depth=depth, field="layer"), "block"),)
        block = scale_layer(_BLOCK, depth_published=_DEPTH, depth=depth)
        return (BlockCut(min(block, allowed[-1]), "block"),)

    def block_counts(self, tower: Tower, rows: int, keep: int | None) -> tuple[int, ...]:
        """Whether that many centres form a grid, `reduce` sees: it depends on the picture's."""
        if keep is None:
            raise BudgetError(f"{self.name} needs a budget, e.g. keep_ratio=0.25.")
        return (keep,)

    def reachable(self, grid: tuple[int, int], keep: int) -> int:
        """The lower one of two."""
        total = grid[0] * grid[1]
        near = (n for step in count() for n in (keep - step, keep + step) if 1 <= n <= total)
        return next(n for n in near if n == total or _like(grid, n))

    def reads(self, cut: BlockCut, tower: Tower) -> tuple[Signal, ...]:
        return (BlockInput(cut.block),)

    def reduce(self, rows: EncoderRows, keep: int) -> Reduction:
        grid = rows.grid
        if grid is None or grid[0] * grid[1] != rows.count:
            raise UnsupportedFeatureError(
                f"{self.name} clusters whole grids of patches, and {rows.count} rows of this "
                f"picture are on {'none' if grid is None else ' x '.join(map(str, grid))}: use "
                f"evit or tome for pictures that are cut or padded."
            )
        matrix, nearest = clustered(
            rows.signals[BlockInput(rows.cut.block)].float(),
            grid,
            self._centres(grid, keep),
            rounds=self.rounds,
            temperature=self.temperature,
            window=self.window,
        )
        none = nearest.new_full((len(nearest), keep), -1)
        return Reduction(source=none, owner=nearest, matrix=matrix)

    def restore(self, before: Tensor, after: Tensor, done: Reduction) -> Tensor:
        rows = before.float()
        return restored(
            rows,
            done.apply(rows),
            after,
            temperature=self.temperature,
            nearest=self.nearest,
        )

    def _centres(self, grid: tuple[int, int], keep: int) -> tuple[int, int]:
        """Rows and columns of `keep` centres."""
        found = _like(grid, keep)
        if found is not None:
            return found
        raise BudgetError(
            f"{self.name} cannot lay {keep} centres on a grid like the picture's {grid[0]} x "
            f"{grid[1]}: the nearest count that it can is {self.reachable(grid, keep)}."
        )


def _like(grid: tuple[int, int], keep: int) -> tuple[int, int] | None:
    """The grid of `keep` places that is most like one, the wider of two; None: none is."""
    high, wide = grid

    def longer(rows: int) -> float:
        across, along = rows * wide, keep // rows * high
        return max(across, along) / min(across, along)

    fitting = [n for n in range(1, high + 1) if keep % n == 0 and keep // n <= wide]
    best = min(fitting, key=longer, default=None)
    return None if best is None or longer(best) > _LONGEST else (best, keep // best)

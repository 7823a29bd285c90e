"""EViT: in three blocks of the encoder, keep what CLS attends to and fuse the rest into one row.

Reference: Not All Patches are What You Need: Expediting Vision Transformers via Token
    Reorganizations, ICLR 2022, arXiv 2202.07800.
Upstream: youweiliang/evit, evit.py (Attention.forward, Block.forward), helpers.py,
    commit 5ca95a7cf4a8637193284895c5bc0dd9dc365982.
Differs: kept rows stay in their order (official: by falling attention, which attention without
    windows and rotation does not see). A single row that would be fused stays as it is without
    a budget. Encoders without CLS use the mean attention that a row receives. Rotary
    encoders fuse nothing, as a fused row has no position. A budget counts the fused row, and keeps
    the same share at each cut. Scores are float32 and ties go to the lower row (official: the
    model's dtype, ties open). Published accuracies are of models trained with it. Blocks 3, 6 and 9
    of 12 are scaled to other depths, and each is cut once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...amount import Budget
from ...blocks import FewCuts, refuse_both
from ...contract import (
    BlockCut,
    ClsAttention,
    EncoderRows,
    ReceivedAttention,
    Reduction,
    Signal,
    Tower,
)
from ...errors import MethodFieldError
from ...fields import check_flag, check_fraction
from ...ops.topk import ascending, top_k
from ...registry import register

_RATE = 0.7


@register("evit")
@dataclass(frozen=True, kw_only=True)
class EViT(FewCuts):
    """The rows with the highest attention stay; the others become one row, their sum weighted by
    attention.

    `rate`: the share that stays at each cut, None for the paper's 0.7; or give a budget instead.
    `layers`: the blocks that are cut, None for the paper's. `fuse`: whether the others become a
    row; None: where the encoder is not rotary.
    """

    needs_budget: ClassVar[bool] = False
    finds_count: ClassVar[bool] = True

    rate: float | None = None
    fuse: bool | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rate is not None:
            check_fraction("rate", self.rate)
            if self.rate == 0:
                raise MethodFieldError("rate=0 is not possible: give a share above 0, up to 1.")
        if self.fuse is not None:
            check_flag("fuse", self.fuse)

    def check_budget(self, budget: Budget | None) -> None:
        super().check_budget(budget)
        refuse_both(self.name, budget, rate=self.rate)

    def fuses(self, tower: Tower) -> bool:
        return not tower.rotary if self.fuse is None else self.fuse

    def blocks(self, tower: Tower) -> tuple[BlockCut, ...]:
        if self.fuse and tower.rotary:
            raise MethodFieldError(
                "fuse=True is not possible in an encoder that turns rows by their positions, as a "
                "fused row has none: leave it out."
            )
        return super().blocks(tower)

    def block_counts(self, tower: Tower, rows: int, keep: int | None) -> tuple[int, ...]:
        if keep is not None:
            return super().block_counts(tower, rows, keep)
        rate = _RATE if self.rate is None else self.rate
        counts = []
        for _ in self.blocks(tower):
            rows = min(rows, math.ceil(rate * rows) + self.fuses(tower))
            counts.append(rows)
        return tuple(counts)

    def reads(self, cut: BlockCut, tower: Tower) -> tuple[Signal, ...]:
        return (ClsAttention(cut.block) if tower.has_cls else ReceivedAttention(cut.block),)

    def reduce(self, rows: EncoderRows, keep: int) -> Reduction:
        attention = self._attention(rows)
        if not self.fuses(rows.tower):
            return Reduction(source=ascending(top_k(attention, keep)))
        kept = ascending(top_k(attention, keep - 1))
        places = torch.arange(keep - 1, device=rows.device).expand_as(kept)
        return Reduction(
            source=torch.cat([kept, kept.new_full((len(kept), 1), -1)], 1),
            owner=torch.full_like(rows.numbers, keep - 1).scatter(1, kept, places),
            weights=attention.scatter(1, kept, 1.0),
            normal=False,
        )

    def _attention(self, rows: EncoderRows) -> Tensor:
        """(B, N) of CLS, or of the mean row: a share of what one row gives."""
        (signal,) = self.reads(rows.cut, rows.tower)
        attention = rows.signals[signal].float()
        if rows.tower.has_cls:
            return attention
        return attention / (rows.count + rows.tower.prefix)

"""MCTF: in all blocks but the first, rows that are alike, unattended and small merge both ways.

Reference: Multi-criteria Token Fusion with One-step-ahead Attention for Efficient Vision
    Transformers, CVPR 2024, arXiv 2403.10030.
Upstream: mlvlab/MCTF, utils/mctf.py (mctf, bipartite_soft_matching, merge_wavg),
    commit 2004da0cad3231fa74cbd60b6042b0bd133aacde.
Differs: one step ahead, as published: the block's attention is the one of the rows before they
    merge, and reads values of merged rows. Blocks 1 to 11 of 12 are all from the same depth on,
    those that see the whole picture. Products of factors are sums of logarithms; scores are float32
    and ties go to the lower row (official: ties open). All rows in front of the patches are
    protected. On encoders without CLS none is: candidates begin with the first patch, and those
    that are left stand by falling score, as in the official code without protection. A budget finds
    the smallest `r` that reaches it, below 10 rows as well. The maximum as a pooling is left out,
    as it is no mean of rows. Published accuracies are of models finetuned with it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ...amount import Budget
from ...blocks import merging_to, refuse_both, seeing_all
from ...contract import (
    BlockCut,
    BlockInput,
    EncoderRows,
    InEncoder,
    ReceivedAttention,
    Reduction,
    Signal,
    Tower,
)
from ...errors import MethodFieldError
from ...fields import check_choice, check_flag, check_number
from ...layers import scale_layer
from ...ops.bipartite import matched, sides
from ...registry import register

Pooling = Literal["attention", "size", "even"]
_FIRST, _DEPTH = 1, 12
_R = 16
_FEWEST = 10
"""Rows, those in front of the patches included, that the published schedule leaves."""
_TINY = torch.finfo(torch.float32).tiny


@register("mctf")
@dataclass(frozen=True, kw_only=True)
class MCTF(InEncoder):
    """Pairs score by likeness, by how little attention they receive and by how few patches they
    hold.

    `r`: rows that each block merges, or below 1 the share of them; None for the paper's 16; or give
    a budget instead. `tau_sim`, `tau_info`, `tau_size`: the root that is taken of each factor, 0
    leaves it out. `bidirectional`: half of the rows merge one way, half the other. `pooling`: a
    merged row is the mean weighted by attention and patches, by patches alone (`size`), or by
    nothing (`even`).
    """

    needs_budget: ClassVar[bool] = False
    finds_count: ClassVar[bool] = True
    proportional: ClassVar[bool] = True
    fused_values: ClassVar[bool] = True

    r: float | None = None
    tau_sim: float = 1
    tau_info: float = 20
    tau_size: float = 40
    bidirectional: bool = True
    pooling: Pooling = "attention"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.r is not None:
            check_number("r", self.r, positive=True)
            if self.r >= 1 and self.r != int(self.r):
                raise MethodFieldError(
                    f"r={self.r!r} is not possible: give a whole number of rows, or a share of "
                    f"them below 1."
                )
        for field in ("tau_sim", "tau_info", "tau_size"):
            check_number(field, getattr(self, field))
        check_flag("bidirectional", self.bidirectional)
        check_choice("pooling", self.pooling, get_args(Pooling))

    def check_budget(self, budget: Budget | None) -> None:
        super().check_budget(budget)
        refuse_both(self.name, budget, r=self.r)

    def blocks(self, tower: Tower) -> tuple[BlockCut, ...]:
        allowed = seeing_all(tower)
        first = scale_layer(_FIRST, depth_published=_DEPTH, depth=tower.num_layers)
        return tuple(BlockCut(block) for block in allowed if block >= min(first, allowed[-1]))

    def block_counts(self, tower: Tower, rows: int, keep: int | None) -> tuple[int, ...]:
        blocks = len(self.blocks(tower))
        if keep is not None:
            return merging_to(self.name, rows, keep, blocks)
        counts = []
        for _ in range(blocks):
            rows -= self._merged(rows, tower.prefix)
            counts.append(rows)
        return tuple(counts)

    def reads(self, cut: BlockCut, tower: Tower) -> tuple[Signal, ...]:
        return BlockInput(cut.block), ReceivedAttention(cut.block)

    def reduce(self, rows: EncoderRows, keep: int) -> Reduction:
        features, received = (
            rows.signals[signal].float() for signal in self.reads(rows.cut, rows.tower)
        )
        received = received.clamp_min(_TINY)  # a softmax may give nothing to a row
        prefix, merged = rows.tower.prefix, rows.count - keep
        back = merged - merged // 2 if self.bidirectional else 0
        source, owner = matched(
            self._scores(features, received, rows.sizes, prefix),
            prefix,
            merged - back,
            back,
            in_order=prefix > 0,
        )
        weights = {"attention": received * rows.sizes, "size": rows.sizes, "even": None}
        return Reduction(source=source, owner=owner, weights=weights[self.pooling])

    def _merged(self, rows: int, prefix: int) -> int:
        """Rows that a block merges, by the published rule."""
        r = _R if self.r is None else self.r
        r = min(r, rows + prefix - _FEWEST)
        return max(0, min(int(r * rows if r < 1 else r), rows // 2))

    def _scores(self, features: Tensor, received: Tensor, sizes: Tensor, prefix: int) -> Tensor:
        """Logarithms of how well the rows of one side merge with those of the other: (B, N_A, N_B).

        Factors that all pairs share are left out: that attention is a sum over rows and no mean,
        and the largest of each factor, by which the authors divide.
        """
        ones, others = sides(normalize(features, dim=-1), prefix)
        scores = ones.new_zeros(())
        if self.tau_sim:
            scores = ((ones @ others.mT + 1) / 2).clamp_min(0).log() / self.tau_sim
        for values, tau in ((received, self.tau_info), (sizes, self.tau_size)):
            if tau:
                one, other = sides(values.log() / tau, prefix)
                scores = scores - (one[:, :, None] + other[:, None])
        return scores.expand(len(ones), ones.shape[1], others.shape[1])

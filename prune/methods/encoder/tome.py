"""ToMe: every block of the encoder merges the rows whose keys are most alike.

Reference: Token Merging: Your ViT But Faster, ICLR 2023, arXiv 2210.09461.
Upstream: facebookresearch/ToMe, tome/merge.py (bipartite_soft_matching, merge_wavg),
    commit af95e4b1befa172dadccd8c81e223b10090f9579.
Differs: `r` is one number for all blocks (official also: falling or rising schedules, lists), and a
    budget finds the smallest that reaches it. Keys are those that attention uses, after their norm
    and rotation where the model has these (official: what the linear layer gives). All rows in
    front of the patches are protected (official: CLS and distillation). In windowed encoders only
    blocks that see the whole picture merge. Scores are float32 and ties go to the lower row
    (official: the model's dtype, ties open). Rows come out in the order of their patches (official
    without CLS: most alike last, and TinyChart's LLM reads them so). TinyChart's setting is `r=84`
    on a SigLIP encoder at 768 pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch.nn.functional import normalize

from ...amount import Budget
from ...blocks import merging, merging_to, refuse_both, seeing_all
from ...contract import BlockCut, EncoderRows, InEncoder, Keys, Reduction, Signal, Tower
from ...fields import check_int
from ...ops.bipartite import matched, sides
from ...registry import register


@register("tome")
@dataclass(frozen=True, kw_only=True)
class ToMe(InEncoder):
    """Every second row is a candidate, the others are targets; the candidates nearest to a target
    become part of it, a mean weighted by patches.

    `r` rows merge in each block, half of them at most; or give a budget instead.
    """

    finds_count: ClassVar[bool] = True
    proportional: ClassVar[bool] = True

    r: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.r is not None:
            hint = "give a whole number of rows that each block merges, at least 1"
            check_int("r", self.r, at_least=1, hint=hint)

    @property
    def wants_budget(self) -> bool:
        return self.r is None

    def check_budget(self, budget: Budget | None) -> None:
        super().check_budget(budget)
        refuse_both(self.name, budget, r=self.r)

    def blocks(self, tower: Tower) -> tuple[BlockCut, ...]:
        return tuple(BlockCut(block) for block in seeing_all(tower))

    def block_counts(self, tower: Tower, rows: int, keep: int | None) -> tuple[int, ...]:
        blocks = len(self.blocks(tower))
        if keep is None:
            return merging(rows, [self.r or 0] * blocks)
        return merging_to(self.name, rows, keep, blocks)

    def reads(self, cut: BlockCut, tower: Tower) -> tuple[Signal, ...]:
        return (Keys(cut.block),)

    def reduce(self, rows: EncoderRows, keep: int) -> Reduction:
        prefix = rows.tower.prefix
        unit = normalize(rows.signals[Keys(rows.cut.block)].float().mean(2), dim=-1)
        sources, targets = sides(unit, prefix)
        source, owner = matched(
            sources @ targets.mT, prefix, rows.count - keep, in_order=prefix > 0
        )
        return Reduction(source=source, owner=owner, weights=rows.sizes)

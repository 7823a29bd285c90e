"""Zero-TPrune: what the attention graph ranks low leaves, and what is like something ranked high.

Reference: Zero-TPrune: Zero-Shot Token Pruning through Leveraging of the Attention Graph in
    Pre-Trained Transformers, CVPR 2024, arXiv 2305.17328.
Upstream: none; the authors' repository has no code.
Differs: written from the paper, and inferred where it is open. Inferred are the blocks (1, 3, 6, 9
    and 11 of 12, scaled to other depths, each cut once); the part of both stages in what leaves
    (half each); 50, 10 and 1 rounds of the ranges that it gives for early, middle and late blocks;
    that ranks of mean 1 are compared with the bounds 0.01 and 0.7 of a head's variance, and that
    all heads count where none is within; that CLS begins with 14, the root of 197 rows, and none
    does on other encoders; that the first ranking is one vote; and that keys of all heads are
    compared. Rows leave between a block's attention and its MLP, and the last ranking is that of
    all rows of the block. Scores are float32 and ties go to the lower row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ...blocks import FewCuts
from ...contract import BlockCut, EncoderRows, HeadRank, Keys, Reduction, Signal, Tower
from ...fields import check_fraction
from ...ops.merge import complement
from ...ops.topk import ascending, top_k
from ...registry import register

_ROUNDS = ((1 / 4, 50), (3 / 4, 10), (1, 1))
"""Up to which part of the depth a ranking takes how many rounds."""
_VARIANCES = (0.01, 0.7)
_CLS_START = 14.0


@register("zero_tprune")
@dataclass(frozen=True, kw_only=True)
class ZeroTPrune(FewCuts):
    """One vote of all rows parts them in halves; rows of the lower half leave that are most like
    one of the upper; of the others those leave that rank lowest after more rounds of votes.

    `similar`: the share of what leaves that leaves for being like another row.
    """

    published: ClassVar[tuple[int, ...]] = (1, 3, 6, 9, 11)

    similar: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fraction("similar", self.similar)

    def reads(self, cut: BlockCut, tower: Tower) -> tuple[Signal, ...]:
        start = _CLS_START if tower.has_cls else 1.0
        rounds = next(n for part, n in _ROUNDS if cut.block < part * tower.num_layers)
        ranks = (HeadRank(cut.block, count, start) for count in (1, rounds))
        return Keys(cut.block), *dict.fromkeys(ranks)

    def reduce(self, rows: EncoderRows, keep: int) -> Reduction:
        keys, first, *more = (rows.signals[need] for need in self.reads(rows.cut, rows.tower))
        vote = _importance(first)
        leaving = min(round(self.similar * (rows.count - keep)), rows.count // 2)
        alike = _like_others(keys, vote, leaving)
        rank = _importance(more[0]) if more else vote
        rank = rank.scatter(1, alike, -torch.inf)
        return Reduction(source=ascending(top_k(rank, keep)))


def _importance(ranks: Tensor) -> Tensor:
    """Ranks of heads (B, N, H), combined by the root of their mean square: (B, N). Heads that rank
    all rows alike, or nearly nothing but one, are left out."""
    ranks = ranks.float()
    least, most = _VARIANCES
    spread = ranks.var(1, correction=0)
    used = (spread >= least) & (spread <= most)
    used = used | ~used.any(1, keepdim=True)
    squares = (ranks.square() * used[:, None]).sum(2)
    return (squares / used.sum(1, keepdim=True)).sqrt()


def _like_others(keys: Tensor, vote: Tensor, count: int) -> Tensor:
    """The `count` rows of the half with fewer votes whose keys are nearest to one of the other
    half: (B, count)."""
    num_rows = vote.shape[1]
    upper = ascending(top_k(vote, num_rows - num_rows // 2))
    lower = complement(upper, num_rows)
    unit = normalize(keys.float().flatten(2), dim=-1)
    picture = torch.arange(len(vote), device=vote.device)[:, None]
    nearest = (unit[picture, lower] @ unit[picture, upper].mT).amax(2)
    return lower.gather(1, top_k(nearest, count))

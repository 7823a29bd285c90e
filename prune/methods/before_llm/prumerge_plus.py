"""PruMerge+: PruMerge with evenly spaced tokens beside those that CLS attends to.

Reference: LLaVA-PruMerge: Adaptive Token Reduction for Efficient Large Multimodal Models,
    ICCV 2025, arXiv 2403.15388.
Upstream: 42Shawn/LLaVA-PruMerge, llava/model/multimodal_encoder/clip_encoder.py
    (token_prune_merge_advanced_plus), commit 097c04116a58465e4bcb58cec44a94018a68ff1a.
Differs: as PruMerge. A budget is split 1:3 between attention and space, as the published spacing
    splits it on average, and the spaced tokens lie evenly among those not taken by attention.
    The published spacing is at least 1 (official: 0 and a crash where more than a third of the
    tokens stand out); at least one token counts as standing out (official: a crash where none
    does). As published, the last token is never a spaced one, and everything else is kept where
    more than a sixth stand out.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...ops.merge import complement
from ...ops.topk import top_k
from ...registry import register
from .prumerge import PruMerge


@register("prumerge_plus")
@dataclass(frozen=True, kw_only=True)
class PruMergePlus(PruMerge):
    """A quarter of the kept tokens by CLS attention, the others evenly spaced; one aggregate."""

    def most(self, num_tokens: int) -> int:
        return num_tokens

    def centres(self, weights: Tensor, count: int) -> Tensor:
        attended = top_k(weights, max(1, round(count / 4)))
        rest, spaced = complement(attended, len(weights)), count - len(attended)
        places = torch.arange(spaced, device=rest.device) * len(rest) // max(1, spaced)
        return torch.cat([attended, rest[places]])

    def adaptive_centres(self, weights: Tensor, outliers: int) -> Tensor:
        attended, num_tokens = top_k(weights, outliers), len(weights)
        step = max(1, num_tokens // outliers // 3)
        spaced = torch.arange(0, num_tokens - 1, step, device=weights.device)
        new = torch.ones_like(weights, dtype=torch.bool).index_fill(0, attended, False)
        return torch.cat([attended, spaced[new[spaced]]])

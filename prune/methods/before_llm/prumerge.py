"""PruMerge: keep the tokens whose CLS attention stands out, each joined by those with similar keys.

Reference: LLaVA-PruMerge: Adaptive Token Reduction for Efficient Large Multimodal Models,
    ICCV 2025, arXiv 2403.15388.
Upstream: 42Shawn/LLaVA-PruMerge, llava/model/multimodal_encoder/clip_encoder.py
    (token_prune_merge_advanced), commit 097c04116a58465e4bcb58cec44a94018a68ff1a.
Differs: a budget is possible and exact: its rows are the most attended tokens and the aggregate
    of all others. A single row is the most attended token, without aggregate.
    Where no attention stands out, the most attended token is kept beside the aggregate.
    As published, a row is its token plus the attention-weighted *sum* of its neighbours, and the
    aggregate such a sum of all tokens that are not kept: weights are small and not normalised.
    With fewer than 33 tokens, all others are neighbours.
    Tiles are handled one by one, each with its own quartiles. `scores="received"` weighs by
    received attention (of several heads) normalised to a sum of 1. Keys are those that the
    encoder's attention uses, rotated where it rotates them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ...contract import (
    BeforeLLM,
    ClsAttentionOneHead,
    EncoderFeatures,
    Keys,
    ModelShape,
    ReceivedAttention,
    Selection,
    Signal,
    VisualTokens,
)
from ...fields import check_int, check_layer
from ...layers import encoder_layer
from ...ops.merge import bags, complement, top_set
from ...ops.topk import ascending, top_k
from ...registry import register
from ...salience import WITHOUT_CLS, Scores, check_scores

_BLOCK = 256  # kept tokens whose similarities to all others are held at once


@register("prumerge")
@dataclass(frozen=True, kw_only=True)
class PruMerge(BeforeLLM):
    """Outliers of CLS attention (without a budget) or the most attended, plus one aggregate.

    Each takes in its `neighbours` nearest tokens. `layer` is the ViT layer whose attention and
    keys are read; None takes the last.
    """

    needs_budget: ClassVar[bool] = False
    finds_count: ClassVar[bool] = True
    without_cls: ClassVar[Mapping[str, object]] = WITHOUT_CLS

    neighbours: int = 32
    layer: int | None = None
    scores: Scores = "cls"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_int("neighbours", self.neighbours, at_least=0, hint="give a whole number, 0 or more")
        check_layer("layer", self.layer)
        check_scores(self.scores)

    def needs(self, shape: ModelShape) -> tuple[Signal, ...]:
        layer = encoder_layer(self.layer, -1, shape.tower, field="layer")
        one_head = self.scores == "cls"
        attention = ClsAttentionOneHead(layer) if one_head else ReceivedAttention(layer)
        return (attention, Keys(layer), EncoderFeatures())

    def select(self, tokens: VisualTokens, keep: int) -> Selection:
        weights = self._weights(tokens)
        centres = self.centres(weights, max(1, keep - 1))
        return self._merged(tokens, weights, centres, aggregate=keep > 1)

    def select_adaptive(self, tokens: VisualTokens) -> Selection:
        weights = self._weights(tokens)
        centres = self.adaptive_centres(weights, max(1, _count_outliers(weights)))
        return self._merged(tokens, weights, centres, aggregate=len(centres) < len(weights))

    def most(self, num_tokens: int) -> int:
        # Above the third quartile by 1.5 times the quartiles' distance lie N // 4 tokens at most.
        return min(num_tokens, max(1, num_tokens // 4) + 1)

    def centres(self, weights: Tensor, count: int) -> Tensor:
        """Exactly `count` tokens to keep, in the order in which the LLM sees them."""
        return top_k(weights, count)

    def adaptive_centres(self, weights: Tensor, outliers: int) -> Tensor:
        """The tokens to keep where attention has so many outliers."""
        return top_k(weights, outliers)

    def _weights(self, tokens: VisualTokens) -> Tensor:
        """(N,), whose sum is the attention that falls on tokens."""
        scores = tokens.signals[self.needs(tokens.shape)[0]].float()
        return scores if self.scores == "cls" else scores / scores.sum()

    def _merged(
        self, tokens: VisualTokens, weights: Tensor, centres: Tensor, *, aggregate: bool
    ) -> Selection:
        _, keys, features = (tokens.signals[signal] for signal in self.needs(tokens.shape))
        nearest = _nearest(keys, centres, self.neighbours)
        bag = torch.cat([centres[:, None], nearest], 1)  # (K, 1 + neighbours)
        shares = torch.cat([torch.ones_like(weights[centres, None]), weights[nearest]], 1)
        rest = complement(centres, len(weights)) if aggregate else centres[:0]
        members = torch.cat([bag.flatten(), rest])
        starts = torch.arange(len(centres) + aggregate, device=centres.device) * bag.shape[1]
        rows = torch.arange(len(members), device=centres.device) // bag.shape[1]
        return Selection(
            kept=ascending(centres),
            order=torch.cat([centres, centres.new_full((int(aggregate),), -1)]),
            features=bags(features, members, starts, torch.cat([shares.flatten(), weights[rest]])),
            groups=torch.stack([rows.clamp_max(len(centres)), members]),
            scores=weights,
        )


def _nearest(keys: Tensor, centres: Tensor, count: int) -> Tensor:
    """For each of `centres` (K,), the `count` other tokens whose keys are most similar: (K, k)."""
    unit = normalize(keys.flatten(1).float(), dim=-1)
    found = []
    for block in centres.split(_BLOCK):
        similarity = (unit[block] @ unit.T).scatter_(1, block[:, None], -torch.inf)
        found.append(top_set(similarity, min(count, len(keys) - 1)))
    return torch.cat(found)


def _count_outliers(weights: Tensor) -> int:
    """How many lie above the upper quartile by more than 1.5 times the distance of quartiles."""
    low, high = weights.quantile(weights.new_tensor([0.25, 0.75]))
    return int((weights > high + 1.5 * (high - low)).sum())

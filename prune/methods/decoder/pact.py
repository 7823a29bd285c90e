"""PACT: drop what neither a mean query nor its own size speaks for, and merge what is alike.

Reference: PACT: Pruning and Clustering-Based Token Reduction for Faster Visual Language Models,
    CVPR 2025, arXiv 2504.08966.
Upstream: orailix/PACT, transformers/models/qwen2/modeling_qwen2.py (the block in front of the layer
    of reduction) and transformers/PACT/utils.py (token_reduction, DBDPC, merge_clusters),
    commit cf9a0c9ff4820cb5bb1a4c97d9d92f4b838a3a52.
Differs: a budget, which the code does not know, makes centres of the tokens that are farthest from
    any denser one: what the published rule takes in its first round, cut to a count.
    Newlines are tokens like all others (official: not candidates, always kept).
    Every image has its own choice, and its mean query is that of all in front of its end (official:
    up to the end of the last image).
    The published layer is 4 of 28 (Qwen2-7B); other depths scale from it.
    log(size) is added for every query in every later layer, as meant (official: beside a causal
    flag that current releases of torch refuse); flash attention cannot add it.
    Numbers are float32 and ties go to the lower index (official: the model's dtype, densities by an
    unstable sort).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.linalg import vector_norm
from torch.nn.functional import normalize

from ...contract import (
    Cut,
    GistAttention,
    Hidden,
    InDecoder,
    LayerKeys,
    ModelShape,
    Place,
    Positions,
    Selection,
    Signal,
    VisualTokens,
)
from ...fields import check_fraction, check_layer, check_number
from ...layers import cut_layer, scale_layer
from ...ops.merge import bags
from ...ops.topk import ascending, top_k
from ...registry import register

_LAYER, _DEPTH, _REACH = 4, 28, 2.0


@register("pact")
@dataclass(frozen=True, kw_only=True)
class PACT(InDecoder):
    """One cut, in front of `layer`, whose own projections are read; None takes the published 4 of
    28.

    `share` of the tokens, those with the largest product of attention and norm, are clustered:
    `cutoff` is the largest distance (1 - cosine of keys) of a token from its centre. A token of the
    others joins a cluster whose centre is within `recover` times as far, or is lost. A row is the
    mean of its cluster.
    """

    positions: ClassVar[Positions] = "original"
    needs_budget: ClassVar[bool] = False
    finds_count: ClassVar[bool] = True
    proportional: ClassVar[bool] = True
    waits: ClassVar[str | None] = "how many tokens are near enough to a centre is in the tensors"

    layer: int | None = None
    share: float = 0.55
    cutoff: float = 0.21
    recover: float = 1.5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_layer("layer", self.layer)
        check_fraction("share", self.share)
        check_number("cutoff", self.cutoff)
        check_number("recover", self.recover)

    def needs(self, shape: ModelShape) -> tuple[Signal, ...]:
        layer = self.cuts(shape)[0].layer
        return GistAttention(layer), LayerKeys(layer, ahead=True), Hidden(layer)

    def cuts(self, shape: ModelShape) -> tuple[Cut, ...]:
        depth = shape.decoder.num_layers
        if self.layer is None:
            layer = scale_layer(_LAYER, depth_published=_DEPTH, depth=depth)
        else:
            hint = f"give the first that sees fewer tokens, 1..{depth - 1}"
            layer = cut_layer(self.layer, shape, hint)
        return (Cut(Place.DECODER, layer),)

    def most(self, num_tokens: int) -> int:
        return max(1, int(num_tokens * self.share))

    def select(self, tokens: VisualTokens, keep: int) -> Selection:
        return self._clustered(tokens, keep)

    def select_adaptive(self, tokens: VisualTokens) -> Selection:
        return self._clustered(tokens, None)

    def _clustered(self, tokens: VisualTokens, keep: int | None) -> Selection:
        attention, keys, hidden = (tokens.signals[need] for need in self.needs(tokens.shape))
        states = hidden.detach().float()
        scores = attention.float() * vector_norm(states, dim=-1)
        first = ascending(top_k(scores, max(keep or 1, self.most(len(scores)))))
        unit = normalize(keys.float().flatten(1), dim=-1)
        apart = (1 - unit[first] @ unit[first].T).clamp_min(0).fill_diagonal_(0)
        place = densest_first(apart)
        if keep is None:
            chosen = covering(apart, place, self.cutoff).nonzero()[:, 0]
        else:
            chosen = ascending(top_k(_reach(apart, place), keep))
        centres = first[chosen]
        distance, owner = (1 - unit @ unit[centres].T).clamp_min(0).min(1)
        owner = owner.index_copy(0, centres, torch.arange(len(centres), device=owner.device))
        stays = distance <= self.recover * self.cutoff
        stays = stays.index_fill(0, first, True)
        features, groups = _merged(hidden, owner, stays, len(centres))
        return Selection(
            kept=centres,
            order=centres,
            features=features,
            projected=True,
            groups=groups,
            scores=scores,
        )


def densest_first(apart: Tensor) -> Tensor:
    """The place of each token (n,), 0 for the one with most others near it, by distances (n, n)."""
    # exp(-x) - 1 rather than exp(-x): the sums are close to each other.
    density = torch.expm1(-(apart / _REACH).square()).sum(1)
    return density.argsort(descending=True, stable=True).argsort()


def covering(apart: Tensor, place: Tensor, cutoff: float) -> Tensor:
    """Which tokens are centres, (n,) bool: from the densest on, each that is not within `cutoff` of
    a centre. Round by round: all that have no denser token near them which may become one."""
    near = apart <= cutoff
    denser = near & (place < place[:, None])
    left = torch.ones_like(place, dtype=torch.bool)
    centres = torch.zeros_like(left)
    while bool(left.any()):
        new = left & ~(denser & left).any(1)
        centres |= new
        left = left & ~(near & new).any(1)
    return centres


def _reach(apart: Tensor, place: Tensor) -> Tensor:
    """How far the nearest denser token is from each, (n,); infinite for the densest."""
    return apart.masked_fill(place >= place[:, None], torch.inf).amin(1)


def _merged(hidden: Tensor, owner: Tensor, stays: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Means (count, D) of the rows (N, D) that stay, by the cluster that each belongs to (N,), and
    pairs of a cluster and a row, sorted."""
    behind = owner.where(stays, count)  # those that are lost come last
    cluster, members = behind.sort(stable=True)
    edges = torch.searchsorted(cluster, torch.arange(count + 1, device=owner.device))
    sizes = edges.diff().clamp_min(1)
    weights = (1 / sizes.float())[cluster.clamp_max(count - 1)] * (cluster < count)
    rows = bags(hidden, members, edges, weights)[:count]
    pairs = torch.stack([cluster, members])
    return rows, pairs[:, cluster < count]

"""Elastic Cache: after prefill, merge the least attended entries into those that stay.

Reference: Efficient Inference of Vision Instruction-Following Models with Elastic Cache, ECCV 2024,
    arXiv 2407.18121.
Upstream: liuzuyan/ElasticCache, kv_cache.py (ElasticCache.__call__),
    commit 3138e03fc8894231d98a2e5353f27a59af854cc3.
Differs: the entries with the highest scores stay, as the paper says. The official code takes an
    argsort for ranks, which is close to a random choice, and merges entries `start_size` places
    before those that it drops.
    Exactly the budget stays (official: one entry less), and where it has no room for an anchor the
    others are dropped unmerged: the last entry comes first, then those of the start.
    Every sample has its own scores (official: one list for all).
    The slot that a decoding step empties follows from the entries that really stayed; in short
    caches it stays behind the start and before the new entry.
    Means are float32 and cast back (official: the model's dtype).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from einops import rearrange
from torch import Tensor

from ...contract import CacheEntries, Compressed, Compressing, ModelShape, ReceivedInLayer, Signal
from ...fields import check_int
from ...ops.merge import bags, complement
from ...ops.topk import ascending, top_k
from ...registry import register


@register("elastic_cache")
@dataclass(frozen=True, kw_only=True)
class ElasticCache(Compressing):
    """The first `start_size` entries, the most attended ones and the last one stay.

    While decoding, the cache keeps its share of all tokens: `distance` is the slot that is emptied
    for it, counted from the end of the compressed prompt if negative, from the start if positive.
    """

    retired: ClassVar[Mapping[str, object]] = {"official": False}

    start_size: int = 1
    distance: int = -25

    def __post_init__(self) -> None:
        super().__post_init__()
        hint = "give the number of first entries that always stay, at least 0"
        check_int("start_size", self.start_size, at_least=0, hint=hint)
        hint = "give a slot, counted from the end of the compressed prompt if negative (-25)"
        check_int("distance", self.distance, hint=hint)

    def needs(self, shape: ModelShape) -> tuple[Signal, ...]:
        return tuple(ReceivedInLayer(layer) for layer in shape.decoder.attending)

    def compress(self, entries: CacheEntries, keep: int) -> Compressed:
        scores = entries.signals[ReceivedInLayer(entries.layer)]
        start = min(self.start_size, keep - 1)
        anchors, dropped = self._parted(scores, start, keep - 1 - start)
        numbers = torch.arange(len(scores), device=scores.device)
        kept = torch.cat([numbers[:start], anchors, numbers[-1:]])
        return replace(_merged(entries, kept, start, dropped), scores=scores)

    def _parted(self, scores: Tensor, start: int, count: int) -> tuple[Tensor, Tensor]:
        """Of the entries between the first `start` and the last, the `count` with the highest
        scores (S,), and the others; both ascending."""
        between = scores[start:-1]
        anchors = ascending(top_k(between, count))
        return anchors + start, complement(anchors, len(between)) + start

    def evict(self, *, prompt: int, kept: int, stored: int, seen: int) -> int | None:
        # In whole numbers: stored - seen * kept / prompt < 1.
        if stored * prompt - seen * kept < prompt:
            return None
        return self.slot(kept, stored)

    def slot(self, kept: int, stored: int) -> int:
        """The entry to remove where `stored` are too many; a prompt has left `kept` of them."""
        slot = self.distance if self.distance > 0 else kept + self.distance
        return min(max(slot, self.start_size), stored - 2)


def _merged(entries: CacheEntries, kept: Tensor, start: int, dropped: Tensor) -> Compressed:
    """`kept` (K,), each anchor the mean of itself and the dropped ones that are nearest to it.

    Anchors are what stays between the first `start` entries and the last one.
    """
    anchors = kept[start:-1]
    if not len(anchors):
        return Compressed(kept=kept)
    rows = torch.arange(len(kept), device=kept.device)
    row, order = torch.cat([rows, start + _nearest(anchors, dropped)]).sort(stable=True)
    members, starts = torch.cat([kept, dropped])[order], torch.searchsorted(row, rows)
    keys, values = (_means(x, members, starts) for x in (entries.keys, entries.values))
    return Compressed(kept=kept, keys=keys, values=values)


def _nearest(anchors: Tensor, numbers: Tensor) -> Tensor:
    """The place in `anchors` (m,), ascending, of the one nearest to each of `numbers` (n,); the
    lower one of two."""
    above = torch.searchsorted(anchors, numbers)
    below = (above - 1).clamp_min(0)
    above = above.clamp_max(len(anchors) - 1)
    nearer = (numbers - anchors[below]).abs() <= (anchors[above] - numbers).abs()
    return torch.where(nearer, below, above)


def _means(heads: Tensor, members: Tensor, starts: Tensor) -> Tensor:
    """Means of bags of entries, for all heads: (H_kv, S, D_head) -> (H_kv, K, D_head)."""
    rows = bags(rearrange(heads, "h s d -> s (h d)"), members, starts)
    return rearrange(rows, "k (h d) -> h k d", h=len(heads))

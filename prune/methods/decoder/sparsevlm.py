"""SparseVLM: keep what the text most akin to the image attends to, and merge some of the rest.

Reference: SparseVLM: Visual Token Sparsification for Efficient Vision-Language Model Inference,
    ICML 2025, arXiv 2410.04417.
Upstream: Gumpest/SparseVLMs, llava/model/language_model/modelling_sparse_llama.py
    (LlamaDynamicvitModel.forward), score.py and utils.py (cluster_and_merge),
    commit 26a5f48813c46cd1c7364160354e7fdd3febaa67.
Differs: a count is the number of rows after a cut, kept and merged ones together. Of a count, as
    many are merged as the code would add to the kept ones; where that leaves no token to keep, the
    best one is kept and the other rows are merged. A single row is the best token.
    As in the code, the counts are fixed lists, without the paper's rule by the rank of attention.
    Without a budget they are relative to 576 tokens. A budget keeps their proportions.
    Densities that are equal are told apart by index (official: by random noise of a millionth,
    which decides everything where tokens are so far apart that densities vanish beside it).
    Distances are in double precision and members summed in float32 (official: the model's dtype).
    If no text token rates above the mean, all of them are raters (official: none, and no score).
    Every image of a sample has raters and a ranking of its own (official: one image).
    Scores are float32 and ties go to the lower index (official: the model's dtype, ties open).
    Published for decoders of 32 layers; others scale from these.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ...budget import round_tokens
from ...contract import (
    Cut,
    Hidden,
    InDecoder,
    ModelShape,
    Positions,
    Selection,
    Signal,
    TextAttention,
    VisualTokens,
)
from ...errors import MethodFieldError
from ...fields import check_int
from ...layers import scale_layers
from ...ops.clusters import merged_clusters
from ...ops.topk import ascending, top_k
from ...registry import register
from ...schedule import cuts_at

Retain = Literal[192, 128, 96, 64]
"""Average tokens per layer of 576, as the paper counts them."""

_LAYERS, _DEPTH, _TOKENS = (3, 7, 16), 32, 576
_AT_ONCE = 2**22  # products of image and text that are held at once


def raters(visual: Tensor, text: Tensor) -> Tensor:
    """The text tokens that look at the image more than the text's mean; all, if none does.

    Args:
        visual: (N, D) embeddings of the image's tokens.
        text: (T, D) embeddings of the text.

    Returns:
        (T,) bool.
    """
    keys = text.float().T
    looks = keys.new_zeros(len(text))
    for part in visual.split(max(1, _AT_ONCE // max(1, len(text)))):
        looks += (part.float() @ keys).softmax(-1).sum(0)
    above = looks > looks.mean()
    return above | ~above.any()


@register("sparsevlm")
@dataclass(frozen=True, kw_only=True)
class SparseVLM(InDecoder):
    """Three cuts by the attention of the raters; a part of what goes is merged into a few rows.

    `retain` is the published schedule, by its average number of tokens; a budget scales it.
    """

    positions: ClassVar[Positions] = "repacked"
    needs_budget: ClassVar[bool] = False
    schedules: ClassVar[Mapping[Retain, tuple[int, ...]]] = {
        192: (309, 204, 113),
        128: (312, 117, 39),
        96: (249, 55, 27),
        64: (82, 32, 18),
    }
    """Rows after each cut, of 576 tokens."""

    retain: Retain = 192

    def __post_init__(self) -> None:
        super().__post_init__()
        hint = f"give one of the published averages, {' or '.join(map(str, self.schedules))}"
        check_int("retain", self.retain, hint=hint)
        if self.retain not in self.schedules:
            raise MethodFieldError(f"retain={self.retain!r} is not possible: {hint}.")

    def needs(self, shape: ModelShape) -> tuple[Signal, ...]:
        return tuple(signal for cut in self.cuts(shape) for signal in self.reads(cut.layer))

    def reads(self, layer: int) -> tuple[Signal, ...]:
        """The signals that the cut at `layer` reads."""
        return (TextAttention(layer - 1, rows=raters), Hidden(layer))

    def cuts(self, shape: ModelShape) -> tuple[Cut, ...]:
        depth = shape.decoder.num_layers
        layers = scale_layers(_LAYERS, depths_published=(_DEPTH,), depth=depth)
        return cuts_at(layers, self.schedules[self.retain])

    def most(self, num_tokens: int) -> int:
        return round_tokens(self.schedules[self.retain][-1] / _TOKENS, num_tokens)

    def select(self, tokens: VisualTokens, keep: int) -> Selection:
        scores, hidden = (tokens.signals[signal] for signal in self.reads(tokens.layer))
        best = _kept_of(tokens.num_tokens, keep)
        ranked = top_k(scores, tokens.num_tokens)
        kept = ascending(ranked[:best])
        if best == keep:
            return Selection(kept=kept, scores=scores)
        recycled = ranked[best : best + _recycled(tokens.num_tokens - best)]
        merged, (cluster, member) = merged_clusters(hidden[recycled], keep - best)
        return Selection(
            kept=kept,
            order=torch.cat([kept, kept.new_full((keep - best,), -1)]),
            features=merged,
            rows=torch.arange(best, keep, device=kept.device),
            projected=True,
            groups=torch.stack([best + cluster, recycled[member]]),
            scores=scores,
        )


def _kept_of(num_tokens: int, rows: int) -> int:
    """How many tokens are kept as they are where `rows` stay of `num_tokens`.

    One token more makes as many rows or one more: the largest number that fits (as published).
    """

    def rows_with(kept: int) -> int:
        return kept + _clusters(num_tokens - kept)

    return max(1, bisect_right(range(1, rows), rows, key=rows_with))


def _recycled(removed: int) -> int:
    """How many of the removed tokens are merged: three tenths."""
    return 3 * removed // 10 + 1


def _clusters(removed: int) -> int:
    """Into how many rows."""
    return _recycled(removed) // 10 + 1

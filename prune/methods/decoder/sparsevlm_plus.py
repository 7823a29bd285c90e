"""SparseVLM+: SparseVLM's raters, rid of what distance adds and heard by some heads; no merging.

Reference: SparseVLM: Visual Token Sparsification for Efficient Vision-Language Model Inference,
    ICML 2025, arXiv 2410.04417.
Upstream: Gumpest/SparseVLMs, llava/model/language_model/modelling_sparse_llama.py
    (LlamaDynamicvitModel.forward with USE_VERSION=2_0) and score.py,
    commit 26a5f48813c46cd1c7364160354e7fdd3febaa67.
Differs: as SparseVLM, but every row is a token. Of models with another number of heads than the
    published 32, the same share of them is heard (official: always 14).
    As published, attention is divided by a factor of the distance that may come near zero and be
    negative, so that a score may change its sign.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from ...contract import Positions, RotaryAffinity, Selection, Signal, TextAttention, VisualTokens
from ...errors import MethodFieldError
from ...fields import check_int
from ...ops.topk import ascending, top_k
from ...registry import register
from .sparsevlm import Retain, SparseVLM, raters

_HEADS, _OF_HEADS = 14, 32


@register("sparsevlm_plus")
@dataclass(frozen=True, kw_only=True)
class SparseVLMPlus(SparseVLM):
    """Three cuts by the attention of the raters, in the heads that look at the image most.

    `heads` is how many heads are heard; None takes the published share, 14 of 32.
    """

    positions: ClassVar[Positions] = "original"
    schedules: ClassVar[Mapping[Retain, tuple[int, ...]]] = {
        192: (300, 200, 118),
        128: (238, 108, 60),
        96: (246, 54, 28),
        64: (66, 34, 20),
    }

    heads: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.heads is not None:
            hint = "give how many heads are heard, or None for 14 of 32"
            check_int("heads", self.heads, at_least=1, hint=hint)

    def reads(self, layer: int) -> tuple[Signal, ...]:
        return (
            TextAttention(layer - 1, rows=raters, each=True),
            RotaryAffinity(layer - 1, rows=raters),
        )

    def select(self, tokens: VisualTokens, keep: int) -> Selection:
        attention, affinity = (tokens.signals[signal] for signal in self.reads(tokens.layer))
        by_head = (attention.float() / affinity[:, None].float()).mean(2)  # (N, H)
        heard = top_k(by_head.sum(0), self._heads(by_head.shape[1]))
        scores = by_head[:, heard].mean(1)
        return Selection(kept=ascending(top_k(scores, keep)), scores=scores)

    def _heads(self, of: int) -> int:
        if self.heads is None:
            return max(1, round(of * _HEADS / _OF_HEADS))
        if self.heads > of:
            raise MethodFieldError(
                f"heads={self.heads} is not possible, as this model has {of}: give 1..{of}, or "
                f"None for 14 of 32."
            )
        return self.heads

"""FastV: after an early decoder layer, keep the visual tokens that the last prompt token reads.

Reference: An Image is Worth 1/2 Tokens After Layer 2: Plug-and-Play Inference Acceleration for
    Large Vision-Language Models, ECCV 2024, arXiv 2403.06764.
Upstream: pkunlp-icler/FastV, src/FastV/llava-hf/transformers/src/transformers/models/llama/
    modeling_llama.py (fastv_forward), commit d1659729b5bf1be225e99ee15783deeea80f63b1.
Differs: every image of every sample has its own ranking (official: the first sample's for all).
    Scores are float32 and ties go to the lower index (official: the model's dtype, ties open).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ...contract import (
    Cut,
    InDecoder,
    ModelShape,
    Place,
    Positions,
    Selection,
    Signal,
    TextAttention,
    VisualTokens,
)
from ...errors import MethodFieldError
from ...fields import check_int
from ...layers import cut_behind_attention
from ...ops.topk import ascending, top_k
from ...registry import register

_HINT = "give the first decoder layer that sees fewer tokens, at least 1 (2 and 3 are published)"


@register("fastv")
@dataclass(frozen=True, kw_only=True)
class FastV(InDecoder):
    """One cut: `layer` is the first decoder layer that sees fewer tokens, on any depth.

    The last layer before it that has attention is read; where none has, the cut is behind the first
    that has."""

    positions: ClassVar[Positions] = "original"
    layer: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_int("layer", self.layer, hint=_HINT)
        if self.layer == 0:
            raise MethodFieldError(f"layer=0 is not possible: {_HINT}.")

    def needs(self, shape: ModelShape) -> tuple[Signal, ...]:
        return (TextAttention(shape.decoder.attends_before(self.cuts(shape)[0].layer)),)

    def cuts(self, shape: ModelShape) -> tuple[Cut, ...]:
        return (Cut(Place.DECODER, cut_behind_attention(self.layer, shape, "fastv", _HINT)),)

    def select(self, tokens: VisualTokens, keep: int) -> Selection:
        (row,) = self.needs(tokens.shape)
        scores = tokens.signals[row]
        return Selection(kept=ascending(top_k(scores, keep)), scores=scores)

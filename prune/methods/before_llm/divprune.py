"""DivPrune: keep the visual tokens that are most different from each other.

Reference: DivPrune: Diversity-based Visual Token Pruning for Large Multimodal Models, CVPR 2025,
    arXiv 2503.02175.
Upstream: vbdi/divprune, LLaVA/llava/model/llava_arch.py (DivPrune, pairwise_cosine_similarity),
    commit 799e2d950aa01ba7860907f5a6d86061f885dca6.
Differs: a running minimum replaces the gathers of every earlier pick, the same picks in O(N) each.
    A picked token is out; the official code repeats it once nothing but duplicates is left.
    Distances are float32 whatever the model runs in (official: the model's dtype, often fp16).
    A token of all zeros is at distance 1 of every other (official: NaN).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ...batches import Greedy
from ...contract import Features, ModelShape, Newlines, Scope, Signal, VisualTokens
from ...ops.maxmin import greedy_max_min
from ...registry import register


@register("divprune")
@dataclass(frozen=True, kw_only=True)
class DivPrune(Greedy):
    """Greedy max-min diversity of the projected features, newlines among them."""

    newline_policies: ClassVar[tuple[Newlines, ...]] = ("compete", "drop", "keep")
    scopes: ClassVar[tuple[Scope, ...]] = ("image", "tile")
    unranked: ClassVar[str | None] = (
        "picks each token by its distance to the picks before it, which is no number of the token "
        "alone"
    )

    def needs(self, shape: ModelShape) -> tuple[Signal, ...]:
        return (Features(),)

    def picks(self, images: Sequence[VisualTokens], count: int) -> Tensor:
        return greedy_max_min([tokens.signals[Features()] for tokens in images], count)

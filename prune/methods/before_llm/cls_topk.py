"""CLS top-k: keep the visual tokens that CLS attends to most, the baseline called FasterVLM.

Reference: [CLS] Attention is All You Need for Training-Free Visual Token Pruning: Make VLM
    Inference Faster, arXiv 2412.01818 v1 (later versions are another method, vispruner).
Upstream: none compared, there is no golden data of it.
Differs: `scores="received"`, for encoders without CLS, ranks by the mean attention received.
    Ties go to the lower index.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from ...batches import InOnePass, ranked, stacked
from ...contract import ModelShape, Scope, Selection, Signal, VisualTokens
from ...fields import check_layer
from ...layers import encoder_layer
from ...ops.topk import ascending, top_k
from ...registry import register
from ...salience import WITHOUT_CLS, Scores, check_scores, salience


@register("cls_topk")
@dataclass(frozen=True, kw_only=True)
class ClsTopK(InOnePass):
    """The top tokens by one ViT layer, `layer` (None: the last but one)."""

    scopes: ClassVar[tuple[Scope, ...]] = ("tile", "image")
    without_cls: ClassVar[Mapping[str, object]] = WITHOUT_CLS

    layer: int | None = None
    scores: Scores = "cls"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_layer("layer", self.layer)
        check_scores(self.scores)

    def needs(self, shape: ModelShape) -> tuple[Signal, ...]:
        layer = encoder_layer(self.layer, -2, shape.tower, field="layer")
        return (salience(self.scores, layer),)

    def select_equal(self, images: Sequence[VisualTokens], keep: int) -> list[Selection]:
        (signal,) = self.needs(images[0].shape)
        scores = stacked(images, signal)
        return list(map(ranked, ascending(top_k(scores, keep)), scores))

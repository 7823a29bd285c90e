"""SCOPE: keep tokens that CLS attends to and that together are like all tokens of the image.

Reference: SCOPE: Saliency-Coverage Oriented Token Pruning for Efficient Multimodal LLMs, NeurIPS
    2025, arXiv 2510.24214.
Upstream: kinredon/SCOPE, scope/clip_encoder.py (CLIPVisionTower_SCOPE.forward, SCOPE),
    commit 6bf73069e0d61307051cfda8e25925bc7b7afdd9.
Differs: what a pick adds is summed in float64 and only where it changed, the same picks in a
    fraction of the time (official: all pairs at every pick, in the model's dtype).
    Attention is the mean over heads (official: their sum, which is the same to `combined="multi"`
    and makes attention weigh more in `"add"`).
    Tiles get shares of the budget by their size (official: all tiles are equal, rounded down).
    A token of all zeros is like nothing (official: NaN). A tile of more tokens than are stored as
    pairs (8192) waits for the device.
    `scores="received"` takes the attention that each token receives, on encoders without CLS.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from torch import Tensor

from ...batches import Greedy, stacked
from ...contract import EncoderFeatures, ModelShape, Signal, VisualTokens
from ...fields import check_choice, check_layer, check_number
from ...layers import encoder_layer
from ...ops.coverage import weighed_cover
from ...registry import register
from ...salience import WITHOUT_CLS, Scores, check_scores, salience

Combined = Literal["multi", "add"]


@register("scope")
@dataclass(frozen=True, kw_only=True)
class SCOPE(Greedy):
    """Greedy coverage in each tile, each gain weighed by attention to the power of `alpha`.

    `combined` says how: multiplied ("multi") or added ("add"). `layer` is the ViT layer whose
    attention is read; None takes the penultimate one.
    """

    unranked: ClassVar[str | None] = (
        "picks tokens by what each adds to the picks before it, which is no number of the token "
        "alone"
    )
    without_cls: ClassVar[Mapping[str, object]] = WITHOUT_CLS

    alpha: float = 1.0
    combined: Combined = "multi"
    layer: int | None = None
    scores: Scores = "cls"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("alpha", self.alpha)
        check_choice("combined", self.combined, get_args(Combined))
        check_layer("layer", self.layer)
        check_scores(self.scores)

    def needs(self, shape: ModelShape) -> tuple[Signal, ...]:
        layer = encoder_layer(self.layer, -2, shape.tower, field="layer")
        return (salience(self.scores, layer), EncoderFeatures())

    def picks(self, images: Sequence[VisualTokens], count: int) -> Tensor:
        attention, features = self.needs(images[0].shape)
        return weighed_cover(
            [tokens.signals[features] for tokens in images],
            stacked(images, attention).float() ** self.alpha,
            count,
            added=self.combined == "add",
        )

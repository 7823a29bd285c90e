"""VTC-CLS: keep the visual tokens that CLS attends to most, summed over the late ViT layers.

Reference: [CLS] Token Tells Everything Needed for Training-free Efficient MLLMs, arXiv 2412.05819.
Upstream: THU-MIG/VTC-CLS, llava/model/multimodal_encoder/clip_encoder.py (cls_token_only) and
    llava/model/llava_arch.py (encode_images), commit e41ac9b4c0db235b3f68a84dbd6bd35f24156a7c.
Differs: the start layer, 16 of 24, scales with the depth of other encoders; of windowed encoders
    only the layers that see the whole image are summed.
    `scores="received"`, for encoders without CLS, sums the mean attention received.
    Ties go to the lower index (official: open).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...batches import InOnePass, ranked
from ...contract import ModelShape, Selection, Signal, VisualTokens
from ...errors import MethodFieldError
from ...fields import check_layer
from ...layers import encoder_layer
from ...ops.topk import ascending, top_k
from ...registry import register
from ...salience import WITHOUT_CLS, Scores, check_scores, salience


@register("vtc_cls")
@dataclass(frozen=True, kw_only=True)
class VtcCls(InOnePass):
    """CLS attention of layers `layer` to the last but one (None: the published 16 of 24)."""

    without_cls: ClassVar[Mapping[str, object]] = WITHOUT_CLS

    layer: int | None = None
    scores: Scores = "cls"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_layer("layer", self.layer)
        check_scores(self.scores)

    def needs(self, shape: ModelShape) -> tuple[Signal, ...]:
        tower = shape.tower
        first = encoder_layer(self.layer, 16, tower, field="layer")
        last = encoder_layer(None, -2, tower, field="layer")
        if self.layer is None:
            first = min(first, last)
        elif first > last:
            raise MethodFieldError(
                f"layer={self.layer} leaves no layer to sum: vtc_cls reads layers `layer` to the "
                f"last but one of {tower.num_layers}; use 0..{last}."
            )
        layers = range(first, last + 1)
        seen = [i for i in layers if tower.full_attention is None or i in tower.full_attention]
        return tuple(salience(self.scores, layer) for layer in seen)

    def select_equal(self, images: Sequence[VisualTokens], keep: int) -> list[Selection]:
        scores = torch.stack([self._scores(tokens) for tokens in images])
        return list(map(ranked, ascending(top_k(scores, keep)), scores))

    def _scores(self, tokens: VisualTokens) -> Tensor:
        """(N,), image by image: a larger tensor may be summed in another order."""
        rows = [tokens.signals[signal].float() for signal in self.needs(tokens.shape)]
        return torch.stack(rows).sum(0)

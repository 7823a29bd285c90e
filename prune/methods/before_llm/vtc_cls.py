"""VTC-CLS: keep the visual tokens that CLS attends to most, summed over the late ViT layers.

Reference: [CLS] Token Tells Everything Needed for Training-free Efficient MLLMs, arXiv 2412.05819.
Upstream: THU-MIG/VTC-CLS, llava/model/multimodal_encoder/clip_encoder.py (cls_token_only) and
    llava/model/llava_arch.py (encode_images), commit e41ac9b4c0db235b3f68a84dbd6bd35f24156a7c.
Differs: the start layer, 16 of 24, scales with the depth of other encoders. Ties go to the lower
    index (official: open).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...contract import BeforeLLM, ClsAttention, ModelShape, Selection, Signal, VisualTokens
from ...errors import MethodFieldError
from ...layers import scale_layer, user_layer
from ...ops.checks import check_layer
from ...ops.topk import ascending, top_k
from ...registry import register


@register("vtc_cls")
@dataclass(frozen=True, kw_only=True)
class VtcCls(BeforeLLM):
    """CLS attention of layers `layer` to the last but one (None: the published 16 of 24)."""

    layer: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_layer("layer", self.layer)

    def needs(self, shape: ModelShape) -> tuple[Signal, ...]:
        depth = shape.tower.num_layers
        last = max(depth - 2, 0)
        if self.layer is None:
            first = min(scale_layer(16, depth_published=24, depth=depth), last)
        else:
            first = user_layer(self.layer, depth=depth, field="layer")
        if first > last:
            raise MethodFieldError(
                f"layer={self.layer} leaves no layer to sum: vtc_cls reads layers `layer` to the "
                f"last but one of {depth}; use 0..{last}."
            )
        return tuple(ClsAttention(layer) for layer in range(first, last + 1))

    def select(self, tokens: VisualTokens, keep: int) -> Selection:
        rows = [tokens.signals[signal].float() for signal in self.needs(tokens.shape)]
        return Selection(kept=ascending(top_k(torch.stack(rows).sum(0), keep)))

"""VisPruner: keep the tokens that CLS attends to most, and of the others those least alike.

Reference: Beyond Text-Visual Attention: Exploiting Visual Cues for Effective Token Pruning in
    VLMs, ICCV 2025, arXiv 2412.01818.
Upstream: Theia-4869/VisPruner, llava/model/llava_arch.py (encode_images),
    commit aefa01adc7c7ce6334e880c88225e90cede760d1.
Differs: where an odd number of tokens is left, the first half is longer by one, and a round never
    drops more than that half (official: a crash). So every count is possible.
    Similarities are float32 (official: the image's dtype, fp16). The outcome hangs on the last bits
    of hundreds of sorted similarities: other devices and dtypes may keep quite other tokens of the
    diverse share. The order of operations is the official one for that reason.
    Sorts are stable: of tokens equally alike to others, those earlier in the list go first.
    A token of all zeros is like none (official: NaN). Newlines are dropped, as published, and
    padding that a model cuts away does not compete. The layer follows the encoder's depth.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ...contract import BeforeLLM, EncoderFeatures, ModelShape, Selection, Signal, VisualTokens
from ...fields import check_fraction, check_layer
from ...layers import encoder_layer
from ...ops.topk import ascending, top_k
from ...registry import register
from ...salience import WITHOUT_CLS, Scores, check_scores, salience

_DROPPED_A_ROUND = 8


@register("vispruner")
@dataclass(frozen=True, kw_only=True)
class VisPruner(BeforeLLM):
    """Share `important` of the budget by attention, rounded down; the rest by removing duplicates.

    `layer` is the ViT layer whose attention is read; None takes the penultimate one.
    """

    without_cls: ClassVar[Mapping[str, object]] = WITHOUT_CLS

    important: float = 0.5
    layer: int | None = None
    scores: Scores = "cls"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fraction("important", self.important)
        check_layer("layer", self.layer)
        check_scores(self.scores)

    def needs(self, shape: ModelShape) -> tuple[Signal, ...]:
        layer = encoder_layer(self.layer, -2, shape.tower, field="layer")
        return (salience(self.scores, layer), EncoderFeatures())

    def select(self, tokens: VisualTokens, keep: int) -> Selection:
        scores, features = (tokens.signals[signal] for signal in self.needs(tokens.shape))
        ranked = top_k(scores, len(scores))
        important = int(keep * self.important)
        kept, rest = ranked[:important], ranked[important:]
        if keep > important:
            kept = torch.cat([kept, _least_alike(features, rest, keep - important)])
        return Selection(kept=ascending(kept), scores=scores)


def _least_alike(features: Tensor, rest: Tensor, count: int) -> Tensor:
    """`count` (>= 1) of the tokens `rest` (R,), each round without those most like another one.

    Every other token is compared with the ones between. The tokens that stay are then listed by
    how much they were alike, in front of those they were compared with.
    """
    unit = normalize(features.float(), dim=-1)
    while len(rest) > count:
        compared, others = rest[0::2], rest[1::2]
        alike = (unit[compared] @ unit[others].T).amax(1)
        drop = min(_DROPPED_A_ROUND, len(rest) - count)
        staying = top_k(alike, len(alike))[drop:]
        rest = torch.cat([compared[staying], others])
    return rest

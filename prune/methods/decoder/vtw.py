"""VTW: behind some layer of the decoder all visual tokens are withdrawn at once.

Reference: Boosting Multimodal Large Language Models with Visual Tokens Withdrawal for Rapid
    Inference, AAAI 2025, arXiv 2405.05803.
Upstream: lzhxmu/VTW, llava/model/language_model/VTW.py (VTWLlamaModel.forward) and
    lmms-evaluation/lmms_eval/__main__.py (the rule for the layer),
    commit a3d8cfc3c3f8c957b02b504f85e140d633c30453.
Differs: published for decoders of 32 layers; elsewhere the layer is at the same relative depth.
    Where no layer of a search is near enough to the uncut model, that is an error that names the
    nearest (official: an index out of range).
    Tokens of all images leave, wherever they are in the prompt (official: 576 from column 35 on).
    Of the two modes of positions the one that keeps them is the default, as published.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...contract import (
    Cut,
    InDecoder,
    ModelShape,
    Place,
    Positions,
    Selection,
    Signal,
    VisualTokens,
)
from ...errors import MethodFieldError
from ...fields import check_layer
from ...layers import cut_layer, scale_layer
from ...registry import register

_LAYER, _FIRST, _DEPTH = 15, 5, 32


@register("vtw")
@dataclass(frozen=True, kw_only=True)
class VTW(InDecoder):
    """`layer` is the first decoder layer without visual tokens; None takes the published 15 of 32.

    Which one a model bears is found once, on a few samples: `eval/measure/withdrawal.py`.
    """

    positions: ClassVar[Positions] = "original"
    needs_budget: ClassVar[bool] = False
    least: ClassVar[int] = 0
    unbudgeted: ClassVar[str | None] = (
        "keeps all visual tokens in front of its layer and none behind, so that layer=16 says how "
        "much is saved (of 32 layers a half): leave the budget out"
    )
    unranked: ClassVar[str | None] = "withdraws all tokens of an image at once, and ranks none"

    layer: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_layer("layer", self.layer)

    def needs(self, shape: ModelShape) -> tuple[Signal, ...]:
        return ()

    def cuts(self, shape: ModelShape) -> tuple[Cut, ...]:
        depth = shape.decoder.num_layers
        if self.layer is None:
            layer = scale_layer(_LAYER, depth_published=_DEPTH, depth=depth)
        else:
            hint = f"give the first that sees no visual token, 1..{depth - 1}"
            layer = cut_layer(self.layer, shape, hint)
        return (Cut(Place.DECODER, layer),)

    def most(self, num_tokens: int) -> int:
        return 0

    def select(self, tokens: VisualTokens, keep: int) -> Selection:
        return Selection(kept=torch.arange(keep))


# --- Which layer -------------------------------------------------------------------------------


def searched_layers(depth: int) -> range:
    """The layers of a decoder of `depth` layers that a search tries, from the published 5 of 32."""
    return range(scale_layer(_FIRST, depth_published=_DEPTH, depth=depth), depth)


def divergences(dense: Tensor, withdrawn: Tensor) -> Tensor:
    """How far the next token's distribution is from the uncut model's, by the layer of withdrawal.

    Args:
        dense: (S, V) logits of the last position of S samples, uncut.
        withdrawn: (S, layers, V), tokens withdrawn at each of the layers.

    Returns:
        (layers,) KL(withdrawn || dense) in nats, the mean over samples, float32.
    """
    before, behind = dense.float().log_softmax(-1)[:, None], withdrawn.float().log_softmax(-1)
    return (behind.exp() * (behind - before)).sum(-1).mean(0)


def first_within(layers: Sequence[int], found: Tensor, eta: float) -> int:
    """The first of the layers whose divergence, of `found` (layers,), is at most `eta`.

    Raises:
        MethodFieldError: none is.
    """
    values = found.tolist()
    near = next((layer for layer, value in zip(layers, values, strict=True) if value <= eta), None)
    if near is None:
        nearest = min(values)
        raise MethodFieldError(
            f"eta={eta!r} is below the divergence of every layer, {layers[0]} to {layers[-1]}: the "
            f"nearest is layer={layers[values.index(nearest)]} with eta={nearest:.4g}."
        )
    return near

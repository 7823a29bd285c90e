"""V2Drop: drop the visual tokens that a decoder layer changes least.

Reference: Variation-aware Vision Token Dropping for Faster Large Vision-Language Models, CVPR 2026,
    arXiv 2509.01552.
Upstream: xuyang-liu16/V2Drop, llava/model/language_model/V2Drop.py (V2DropLlamaModel.forward),
    commit 219e03ede8cf6a70d1534903fa238b13dd900bbb.
Differs: a budget, which the code does not know, is the count after the second cut; twice as many
    stay after the first, as published, and the third cut, which leaves one token, is left out.
    Published for decoders of 32 layers; others scale from these (official for 28 layers: cuts at
    3, 16 and 22, which scaling gives up to a layer, with ratios of 0.25 and 0.05).
    Every image has its own ranking (official: one image, found from the length of the prompt).
    Distances are float32 and ties go to the lower index (official: the model's dtype, ties open).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch.linalg import vector_norm

from ...contract import (
    Cut,
    Hidden,
    InDecoder,
    ModelShape,
    Place,
    Positions,
    Selection,
    Signal,
    VisualTokens,
)
from ...errors import MethodFieldError
from ...fields import check_fraction
from ...ops.topk import ascending, top_k
from ...registry import register
from ...schedule import check_layers, cut_layers

_LAYERS = (3, 17, 22)


@register("v2drop")
@dataclass(frozen=True, kw_only=True)
class V2Drop(InDecoder):
    """Three cuts at `layers`, each the first to see fewer tokens; None takes the paper's.

    Without a budget the first two keep the shares `ratios` of what is alive, one token at least,
    and the third one token.
    """

    positions: ClassVar[Positions] = "original"
    needs_budget: ClassVar[bool] = False

    layers: tuple[int, ...] | None = None
    ratios: tuple[float, ...] = (0.5, 0.5)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layers is not None:
            check_layers(self.layers)
            if len(self.layers) != len(_LAYERS):
                raise MethodFieldError(
                    f"layers={self.layers!r} is not possible: give three layers, e.g. (3, 17, 22)."
                )
        if not isinstance(self.ratios, tuple) or len(self.ratios) != 2:
            raise MethodFieldError(
                f"ratios={self.ratios!r} is not possible: give a tuple of two shares, of what is "
                f"alive before the first and the second cut, e.g. (0.5, 0.5)."
            )
        for ratio in self.ratios:
            check_fraction("ratios", ratio)

    def needs(self, shape: ModelShape) -> tuple[Signal, ...]:
        needs = (need for cut in self.cuts(shape) for need in _reads(cut.layer))
        return tuple(dict.fromkeys(needs))

    def cuts(self, shape: ModelShape) -> tuple[Cut, ...]:
        depth = shape.decoder.num_layers
        layers = cut_layers(self.layers, _LAYERS, depths_published=(32,), depth=depth)
        return tuple(Cut(Place.DECODER, layer) for layer in layers)

    def most(self, num_tokens: int) -> int:
        return 1

    def published_counts(self, shape: ModelShape, num_tokens: int) -> tuple[int, ...]:
        first = max(1, int(num_tokens * self.ratios[0]))
        return first, max(1, int(first * self.ratios[1])), 1

    def counts(self, shape: ModelShape, num_tokens: int, keep: int) -> tuple[int, ...]:
        return 2 * keep, keep, keep

    def select(self, tokens: VisualTokens, keep: int) -> Selection:
        before, after = (tokens.signals[signal].float() for signal in _reads(tokens.layer))
        scores = vector_norm(after - before, dim=-1)
        return Selection(kept=ascending(top_k(scores, keep)), scores=scores)


def _reads(layer: int) -> tuple[Hidden, Hidden]:
    """What enters the layer before a cut, and what enters the layer that is cut."""
    return Hidden(layer - 1), Hidden(layer)

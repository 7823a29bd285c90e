"""PyramidDrop: from stage to stage of the decoder, keep what the last prompt token reads next.

Reference: PyramidDrop: Accelerating Your Large Vision-Language Models via Pyramid Visual Redundancy
    Reduction, CVPR 2025, arXiv 2410.17247 (v2: Conical Visual Concentration).
Upstream: Cooperx521/PyramidDrop, llava/model/modeling_llama_pdrop.py (LlamaModel.pdrop_rank_drop),
    commit 6444f304aee4b7edcb022839fb9e8cd07859704a.
Differs: the last cut's count is rounded, and those before are its multiples (official: each ratio
    of all tokens, truncated). Every image of a sample has its own ranking (official: one image).
    Scores are float32 and ties go to the lower index (official: the model's dtype, ties open).
    Nothing is truncated to a maximal length, and there is no rule for training.
    Published for decoders of 32 and of 40 layers with the same numbers; others scale from 32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ...budget import round_tokens
from ...contract import Cut, InDecoder, ModelShape, Selection, Signal, TextAttention, VisualTokens
from ...errors import MethodFieldError
from ...ops.topk import ascending, top_k
from ...registry import register
from ...schedule import check_layers, check_ratios, cut_layers, cuts_at

_LAYERS, _DEPTHS = (8, 16, 24), (32, 40)


@register("pyramiddrop")
@dataclass(frozen=True, kw_only=True)
class PyramidDrop(InDecoder):
    """Cuts at `layers` to `ratios` of all tokens; a budget keeps the proportions of the ratios.

    `layers` are the first to see fewer tokens; None takes the paper's three. `ratios`: None halves
    the tokens at every cut, as published.
    """

    needs_budget: ClassVar[bool] = False

    layers: tuple[int, ...] | None = None
    ratios: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layers is not None:
            check_layers(self.layers)
        if self.ratios is None:
            return
        check_ratios(self.ratios)
        layers = self.layers or _LAYERS
        if len(self.ratios) != len(layers):
            raise MethodFieldError(
                f"ratios={self.ratios!r} is not possible with the {len(layers)} cuts at layers "
                f"{layers!r}: give one ratio for each layer, or both fields."
            )

    def needs(self, shape: ModelShape) -> tuple[Signal, ...]:
        return tuple(_row(cut.layer) for cut in self.cuts(shape))

    def cuts(self, shape: ModelShape) -> tuple[Cut, ...]:
        depth = shape.decoder.num_layers
        layers = cut_layers(self.layers, _LAYERS, depths_published=_DEPTHS, depth=depth)
        return cuts_at(layers, self._ratios)

    def most(self, num_tokens: int) -> int:
        return round_tokens(self._ratios[-1], num_tokens)

    def select(self, tokens: VisualTokens, keep: int) -> Selection:
        scores = tokens.signals[_row(tokens.layer)]
        return Selection(kept=ascending(top_k(scores, keep)), scores=scores)

    @property
    def _ratios(self) -> tuple[float, ...]:
        if self.ratios is not None:
            return self.ratios
        return tuple(0.5 ** (i + 1) for i in range(len(self.layers or _LAYERS)))


def _row(layer: int) -> TextAttention:
    """The layer that is about to be cut says what its last token would read."""
    return TextAttention(layer, rows="last", ahead=True)

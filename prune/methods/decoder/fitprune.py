"""FitPrune: in every layer, drop the visual tokens that text and image attend to least.

Reference: Fit and Prune: Fast and Training-free Visual Token Pruning for Multi-modal Large Language
    Models, AAAI 2025, arXiv 2409.10197.
Upstream: ywh187/FitPrune, llava/model/language_model/modeling_llama.py, the tables of the model's
    forward and LlamaAttention.forward, commit d28e418c920912b20dc888325651ecc6e214e6a1.
Differs: rows leave in front of the next layer rather than between attention and MLP, so that the
    MLP of the layer that is read still sees them.
    The counts are the released tables, which were fitted for 576 tokens of LLaVA-1.5-7B; they are
    scaled to other numbers of tokens, and between layers of other depths. A budget keeps their
    proportions. The fit of a table from samples is not part of this method.
    Every image of a sample has its own ranking; its own rows and those of the text behind it are
    asked (official: one image, and everything behind it).
    Scores are float32 and ties go to the lower index (official: the model's dtype, ties open).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
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
from ...ops.topk import ascending, top_k
from ...registry import register

_TOKENS, _DEPTH = 576, 32
_REMOVED: Mapping[int, str] = {
    10: "0 0 1 2 1 0 1 4 5 5 11 4 2 2 0 0 1 1 2 4 2 10 1 1 1 2 1 1 0 1 0 0",
    20: "0 0 3 3 1 1 4 16 14 15 24 4 2 3 2 0 6 0 5 13 4 19 2 1 1 1 1 1 2 1 0 0",
    30: "0 0 7 6 4 5 16 40 24 21 24 4 2 3 4 0 16 0 11 26 6 32 3 1 0 1 2 2 4 0 0 0",
    40: "0 1 21 13 14 11 41 53 29 15 14 5 1 4 5 1 26 1 13 28 6 27 2 1 0 0 1 1 2 0 0 0",
    50: "3 7 49 24 29 17 59 41 26 8 10 6 2 5 7 2 30 3 13 27 5 23 2 1 0 0 1 1 2 0 0 0",
    55: "6 17 69 31 34 19 59 30 23 6 8 7 2 5 8 2 29 4 12 25 4 19 2 1 0 0 1 0 1 0 0 0",
    60: "14 33 89 36 36 20 55 21 18 4 7 5 2 5 7 4 26 5 11 24 4 18 2 1 0 0 1 0 1 0 0 0",
    70: "48 79 118 41 33 17 36 9 9 2 3 2 1 3 4 8 18 7 8 20 4 13 2 1 0 0 1 0 1 0 0 0",
    80: "128 127 118 35 26 8 13 3 2 1 0 0 0 2 1 8 7 8 5 11 2 6 1 1 0 0 0 1 0 0 0 0",
    90: "262 153 80 19 13 1 2 0 0 0 0 0 0 0 0 1 1 2 1 2 0 1 0 0 0 0 0 1 0 0 0 0",
}
"""Of 576 tokens, how many leave in each of 32 layers, by the FLOPs that are saved (per cent)."""


@register("fitprune")
@dataclass(frozen=True, kw_only=True)
class FitPrune(InDecoder):
    """A cut behind every layer where the table of `reduction` removes tokens.

    `reduction` is the published saving of FLOPs in per cent, for 576 tokens.
    """

    positions: ClassVar[Positions] = "original"
    needs_budget: ClassVar[bool] = False

    reduction: int = 60

    def __post_init__(self) -> None:
        super().__post_init__()
        hint = f"give one of the published reductions, {', '.join(map(str, _REMOVED))}"
        check_int("reduction", self.reduction, hint=hint)
        if self.reduction not in _REMOVED:
            raise MethodFieldError(f"reduction={self.reduction!r} is not possible: {hint}.")

    def needs(self, shape: ModelShape) -> tuple[Signal, ...]:
        return tuple(need for cut in self.cuts(shape) for need in _reads(cut.layer))

    def cuts(self, shape: ModelShape) -> tuple[Cut, ...]:
        return tuple(Cut(Place.DECODER, layer) for layer in self._gone(shape))

    def most(self, num_tokens: int) -> int:
        return max(1, num_tokens - round(self._table[-1] * num_tokens / _TOKENS))

    def published_counts(self, shape: ModelShape, num_tokens: int) -> tuple[int, ...]:
        gone = self._gone(shape).values()
        return tuple(num_tokens - round(one * num_tokens / _TOKENS) for one in gone)

    def counts(self, shape: ModelShape, num_tokens: int, keep: int) -> tuple[int, ...]:
        gone, total = self._gone(shape).values(), self._table[-1]
        return tuple(num_tokens - round(one * (num_tokens - keep) / total) for one in gone)

    def select(self, tokens: VisualTokens, keep: int) -> Selection:
        text, image = (tokens.signals[signal].float() for signal in _reads(tokens.layer))
        scores = text * image
        return Selection(kept=ascending(top_k(scores, keep)), scores=scores)

    @property
    def _table(self) -> list[int]:
        """How many of 576 tokens are gone behind each of 32 layers."""
        return list(accumulate(map(int, _REMOVED[self.reduction].split())))

    def _gone(self, shape: ModelShape) -> dict[int, float]:
        """The layers that see fewer tokens than those before, and how many of 576 are gone there,
        in all as many as in the table."""
        depth, table = shape.decoder.num_layers, [0, *self._table]
        gone: dict[int, float] = {}
        before = 0.0
        for layer in range(1, depth):
            whole, part = divmod(layer * _DEPTH, depth)
            now = table[whole] + (table[whole + 1] - table[whole]) * part / depth
            if now > before:
                gone[layer], before = now, now
        return {layer: count * table[-1] / before for layer, count in gone.items()}


def _reads(cut: int) -> tuple[TextAttention, TextAttention]:
    """Of the layer before a cut, what text and image attend to: means over rows rank as sums do."""
    text, image = (TextAttention(cut - 1, rows, heads="max") for rows in ("text", "image"))
    return text, image

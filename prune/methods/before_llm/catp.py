"""CATP: keep the tokens that together stand for all of the image, and are close to its text.

Reference: CATP: Contextually Adaptive Token Pruning for Efficient and Enhanced Multimodal
    In-Context Learning, AAAI 2026, arXiv 2508.07871.
Upstream: none, no code was published.
Differs: this is the paper's first stage, which makes half of its cuts. The second one, in the
    decoder, is a method of another place and not part of this one.
    An image without any text is chosen for by coverage alone.
    Tokens enter in positional order and newlines are dropped, which the paper leaves open.
    A token of all zeros is half like every other, as is a text whose embeddings cancel.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor
from torch.nn.functional import normalize

from ...contract import (
    BeforeLLM,
    Features,
    ModelShape,
    Scope,
    Selection,
    Signal,
    TextEmbeddings,
    VisualTokens,
)
from ...errors import MethodFieldError
from ...ops.facility import greedy_cover
from ...ops.topk import ascending
from ...registry import register


@register("catp")
@dataclass(frozen=True, kw_only=True)
class CATP(BeforeLLM):
    """Greedy facility location, plus `alignment` times the likeness to the mean of the text."""

    scopes: ClassVar[tuple[Scope, ...]] = ("image", "tile")

    alignment: float = 0.7

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_weight("alignment", self.alignment)

    def needs(self, shape: ModelShape) -> tuple[Signal, ...]:
        return (Features(), TextEmbeddings())

    def select(self, tokens: VisualTokens, keep: int) -> Selection:
        features, text = (tokens.signals[signal] for signal in self.needs(tokens.shape))
        unit = normalize(features.float(), dim=-1)
        bonus = self.alignment * _aligned(unit, text.float())
        return Selection(kept=ascending(greedy_cover(unit, bonus, keep)))


def _aligned(unit: Tensor, text: Tensor) -> Tensor:
    """Cosine of tokens (N, D) with the mean of text (T, D), moved to 0..1; 0 without text: (N,)."""
    if not len(text):
        return unit.new_zeros(len(unit))
    return (unit @ normalize(text.mean(0), dim=0) + 1) / 2


def _check_weight(field: str, value: Any) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (number and 0 <= value < math.inf):  # also refuses nan
        raise MethodFieldError(f"{field}={value!r} is not possible: give a number, 0 or more.")

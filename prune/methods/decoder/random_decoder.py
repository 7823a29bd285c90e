"""random_decoder: in front of a decoder layer tokens leave by chance, the floor for cuts there.

Reference: none; the usual baseline.
Upstream: none.
Differs: what leaves depends on `seed` and the places of the tokens alone: images of one size lose
    the same places, in every batch, process and run, and on every device. The cut is FastV's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

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
from ...fields import check_int
from ...layers import cut_layer
from ...ops.drawn import drawn
from ...ops.topk import ascending
from ...registry import register

_HINT = "give the first decoder layer that sees fewer tokens, at least 1"


@register("random_decoder")
@dataclass(frozen=True, kw_only=True)
class RandomDecoder(InDecoder):
    """One cut: `layer` is the first decoder layer that sees fewer tokens, on any depth. `seed`
    chooses other places."""

    positions: ClassVar[Positions] = "original"
    unranked: ClassVar[str | None] = "draws tokens by chance"

    layer: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_int("layer", self.layer, hint=_HINT)
        check_int("seed", self.seed, hint="give a whole number")

    def needs(self, shape: ModelShape) -> tuple[Signal, ...]:
        return ()

    def cuts(self, shape: ModelShape) -> tuple[Cut, ...]:
        hint = f"{_HINT}; `random` chooses before the LLM"
        return (Cut(Place.DECODER, cut_layer(self.layer, shape, hint)),)

    def select(self, tokens: VisualTokens, keep: int) -> Selection:
        places = torch.arange(tokens.num_tokens) if tokens.alive is None else tokens.alive
        return Selection(kept=ascending(drawn(places, self.seed).argsort(stable=True)[:keep]))

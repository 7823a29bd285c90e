"""Where methods remove tokens."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Literal

from ..errors import MethodFieldError

Positions = Literal["original", "repacked"]
"""Of the tokens behind a cut: with the gaps that it leaves, or closed up."""
Images = Literal["each", "context", "query"]
"""Which images a cut is for: every one on its own; all but the prompt's last one, pooled, so that
the method chooses from all of them at once; the last one."""


class Place(enum.Enum):
    """Where a method acts, in the order in which a prompt passes the places: `<` is "before"."""

    ENCODER = "in the vision encoder"
    BEFORE_LLM = "before the LLM"
    DECODER = "in the LLM decoder"
    CACHE = "in the KV cache"

    def __repr__(self) -> str:
        return f"Place.{self.name}"

    @property
    def depth(self) -> int:
        """Its number among the places."""
        return list(Place).index(self)

    def __lt__(self, other: Place) -> bool:
        return self.depth < other.depth


@dataclass(frozen=True, slots=True)
class Cut:
    """One removal at a place. In the decoder `layer` is the first layer to see fewer tokens; all
    layers do where they are removed before the LLM, and there it stays 0.

    `share` is the count after this cut relative to the count after the method's last cut, so that
    a schedule keeps its proportions under any budget. `adaptive`: the tensors decide how many stay,
    also under a budget, which then holds for the other cuts; none at all may stay. `below`: layers
    before the cut, which saw the tokens in prefill, no longer store them either.

    Raises:
        MethodFieldError: no place is given.
    """

    place: Place
    layer: int = 0
    share: float = 1.0
    images: Images = "each"
    adaptive: bool = False
    below: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.place, Place):
            raise MethodFieldError(
                f"Cut({self.place!r}) has no place: write Cut(Place.DECODER, {self.place!r}) for "
                f"the first decoder layer that sees fewer tokens, or Cut(Place.BEFORE_LLM)."
            )

    @property
    def depth(self) -> tuple[int, int]:
        """Cuts in this order are in the order in which tokens pass them."""
        return self.place.depth, self.layer

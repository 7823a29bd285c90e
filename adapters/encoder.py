"""What a vision encoder must say of itself so that rows can leave between its blocks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from .hooks import Undo
from .tap import Exchange, Listener, Names, Tap

Bias = Callable[[Tensor], Tensor | None]
"""Of rows (B, S, C) that enter attention: what is added to its logits, (B, 1, 1, S)."""


@dataclass(frozen=True, slots=True)
class EncoderBlock:
    """A pre-norm block: `x + attention(norm1(x))`, then `y + tail(... norm2(y))`."""

    module: Any
    norm1: Any
    attention: Any
    norm2: Any
    tail: Any
    """The last module before the second addition."""


class Encoder(ABC):
    """A vision encoder whose modules belong to its own library's classes. One file in `encoders/`
    for each kind."""

    packed: ClassVar[bool] = False
    """Whether all pictures are one sequence, one behind the other; else they are a batch."""
    unit: int = 1
    """Encoder rows behind one row of a method: the patches that the projector merges."""
    prefix: int = 0
    """Rows in front of the patches of each picture."""

    @property
    @abstractmethod
    def blocks(self) -> Sequence[EncoderBlock]:
        """In the order in which they run."""

    @abstractmethod
    def values(self, block: EncoderBlock, rows: Tensor) -> Tensor:
        """What the block's attention sums up of rows (B, S, C), in place of those that enter the
        block: (B, H, S, D_head)."""

    def tap(
        self,
        block: EncoderBlock,
        names: Names,
        listener: Listener,
        exchange: Exchange,
        bias: Bias,
    ) -> Undo:
        """Let a block's attention show its queries and keys, and compute with others; `bias` is
        for attention that takes numbers to add, and cannot exchange the rest."""
        return Tap(block.attention, names, [listener], exchange).remove

    def name_tap(self, block: EncoderBlock, names: Names) -> None:
        """Register the name of a block's tap, which stays while taps come and go."""
        names.of(block.attention.config._attn_implementation)

    def follow(self, kwargs: dict[str, Any], places: Tensor) -> dict[str, Any]:
        """What goes with rows into a block, for those that are left: `places` (B, K) says which."""
        return kwargs

    def attention_of(self, block: EncoderBlock) -> str:
        """The implementation of attention that the block uses: sdpa, eager, flash..."""
        return str(block.attention.config._attn_implementation)

"""Tokens of a prompt that see each other both ways, and masks that a core makes for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

EVERY_KIND = frozenset({"full_attention", "sliding_attention"})
"""Kinds of decoder layers."""


@dataclass(frozen=True, slots=True)
class BothWays:
    """Tokens of a prompt that see each other both ways, where others see what is before them."""

    blocks: Tensor
    """(B, L): the number of the block that each is in, -1: in none."""
    kinds: frozenset[str] = EVERY_KIND
    """Kinds of decoder layers in which they do."""
    windowed: bool = True
    """Whether a sliding window hides what is far before a token in its own block, too."""


@dataclass(frozen=True, slots=True)
class Given:
    """What a core was given that makes the decoder's masks itself."""

    mask: Any
    """The caller's mask, (B, L), or None."""
    position_ids: Tensor | None
    both_ways: BothWays | None

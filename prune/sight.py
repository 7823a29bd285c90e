"""Which keys the rows of one prompt see in an attention layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Sight:
    """A row sees itself and what is before it; in some layers less than that, in some models more.
    Without arguments: plain causal attention."""

    window: int | None = None
    """A row sees its last `window` keys alone, itself among them."""
    blocks: Tensor | None = None
    """(S,) of each key, the block whose rows see each other both ways, -1: it is in none."""
    windowed: bool = True
    """Whether the window hides what is far before a row in its own block, too."""

    @property
    def plain(self) -> bool:
        """Whether a row sees all keys before it, and no others."""
        return self.window is None and self.blocks is None

    def seen(self, rows: Tensor, count: int) -> Tensor:
        """(R, count) bool: which of the first `count` keys the rows at places (R,) see."""
        keys = torch.arange(count, device=rows.device)
        at = rows[:, None]
        seen = keys <= at
        if self.blocks is None:
            return seen if self.window is None else seen & (keys > at - self.window)
        blocks = self.blocks.to(rows.device)
        block = blocks[at]
        both = (block == blocks[:count]) & (block >= 0)
        if self.windowed:
            seen = seen | both
        if self.window is not None:
            seen = seen & (keys > at - self.window)
        return seen | both if not self.windowed else seen

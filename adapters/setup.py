"""What a patch fixed once for its model, before any call."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..prune.budget import MethodCall
from ..prune.contract import ModelShape, Positions
from .cache import Ticket


@dataclass(frozen=True)
class Setup:
    """The methods in order of depth, and what follows from them and the model."""

    calls: tuple[MethodCall, ...]
    shape: ModelShape
    positions: Positions
    config: Any
    """Configuration of the text model, a `transformers` object."""
    starts: list[int]
    """First layers of the segments that store different tokens: 0, then every cut."""
    ticket: Ticket

    def start_of(self, layer: int) -> int:
        """First layer of the segment that `layer` belongs to."""
        return max(start for start in self.starts if start <= layer)

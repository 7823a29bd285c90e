"""What a patch fixed once for its model, before any call."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

from ..prune.budget import MethodCall
from ..prune.contract import CacheMethod, LayerSignal, ModelShape, Place, Positions, Pruning
from .cache import Ticket


@dataclass(frozen=True)
class Setup:
    """The methods in order of depth, and what follows from them and the model."""

    calls: tuple[MethodCall, ...]
    shape: ModelShape
    positions: Mapping[Place, Positions]
    """The mode at every place where a method acts."""
    text: Any
    """The text model, a `transformers` object."""
    ticket: Ticket
    record: bool = False
    """Whether the scores of all choices are kept for `handle.last`."""
    debug: bool = False
    """Whether the numbers that shipped methods return are looked at too."""

    @property
    def config(self) -> Any:
        """Configuration of the text model."""
        return self.text.config

    @cached_property
    def starts(self) -> list[int]:
        """First layers of the segments that store different tokens: 0, then every cut."""
        cuts = {cut.layer for call in self.calls for cut in call.method.cuts(self.shape)}
        return [0, *sorted(cuts - {0})]

    @cached_property
    def heard(self) -> list[LayerSignal]:
        """Signals of decoder layers for cuts; a method on the cache is shown its own entries."""
        return [
            need
            for call in self.calls
            if isinstance(call.method, Pruning)
            for need in call.method.needs(self.shape)
            if isinstance(need, LayerSignal)
        ]

    @cached_property
    def on_cache(self) -> MethodCall | None:
        """The method on the KV cache."""
        return next((c for c in self.calls if isinstance(c.method, CacheMethod)), None)

    @property
    def reported_positions(self) -> Positions:
        """The mode of the first method."""
        return self.positions[self.calls[0].method.place]

    def start_of(self, layer: int) -> int:
        """First layer of the segment that `layer` belongs to."""
        return max(start for start in self.starts if start <= layer)

    def rotary(self, like: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines of positions (B, K) or (axes, B, K): (B, K, D_head) each, in the dtype
        and on the device of `like`."""
        if position_ids.dim() == 3:
            position_ids = position_ids[-3:]  # without the row that only tells packed sequences
        cos, sin = self.text.rotary_emb(like, position_ids.to(like.device))
        return cos.to(like.device), sin.to(like.device)  # on a sharded model it is elsewhere

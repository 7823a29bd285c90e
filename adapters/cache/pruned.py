"""A KV cache that knows two lengths: what its caller fed, and what is still stored.

The class of the caller's own cache object is exchanged for a subclass, so that `isinstance` and
identity hold. Callers (generate, position ids, second turns) read the *logical* length; masks are
made for the *physical* one, which differs from layer to layer.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cache as memoise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...prune.errors import UnsupportedFeatureError
from ..sequence.layout import Layout

if TYPE_CHECKING:
    from transformers import Cache

    from ..core_mlp import CoreMLP
    from ..patch_setup import Setup


@dataclass
class Segment:
    """Layers from `start` on, up to the next segment: they store the same tokens.

    `dropped` is the logical minus the physical length. `padding` (B, P) bool says which of the
    first P stored columns are tokens (later ones all are); `None`: all of them. `shift` (B, 1) is
    what re-packed positions are behind the caller's; `None`: nothing.
    """

    start: int
    dropped: int = 0
    padding: Tensor | None = None
    shift: Tensor | None = None
    weights: Tensor | None = None
    """(B, P) float32: what is added to the logits of the first P stored columns (of later ones
    nothing), log(size) of merged rows; None: nothing."""
    ledger: Tensor | None = None
    """(B, 4) on the CPU, for methods that go on removing entries while decoding: entries of the
    prompt before and after the method, entries now, tokens fed; zeros: not this row."""

    def enter(
        self, stored: int, layout: Layout, closed: Tensor | None, *, told: bool
    ) -> Tensor | None:
        """A prefill stores `layout` behind `stored` columns; returns which columns are tokens.

        Args:
            closed: (B, 1), how many positions it closed up; None: none.
            told: whether that is to be said where all are, too.
        """
        padding = layout.padding
        if told or padding is not None or self.padding is not None:
            padding = self.extended(stored, layout.valid)
        self.padding = padding
        self.dropped += layout.keep.shape[1] - layout.length
        if closed is not None:
            self.shift = closed if self.shift is None else closed + self.shift
        return padding

    def weigh(self, stored: int, new: Tensor | None) -> Tensor | None:
        """A prefill stores columns with weights `new` (B, K), None for none, behind `stored` ones;
        returns those of all."""
        if new is not None:
            before = self.weights_to(stored)
            before = new.new_zeros(len(new), stored) if before is None else before.to(new.device)
            self.weights = torch.cat([before, new], 1)
        return self.weights

    def weights_to(self, length: int) -> Tensor | None:
        """`weights` for exactly `length` stored columns."""
        if self.weights is None:
            return None
        return pad(self.weights, (0, length - self.weights.shape[1]))

    def leave(self, stored: int, before: Layout, after: Layout, *, told: bool) -> None:
        """Of what a prefill stored as `before` behind `stored` columns, `after` is left; `told` as
        for `enter`."""
        if told or after.padding is not None or self.padding is not None:
            self.padding = self.extended(stored, after.valid)
        self.dropped += before.length - after.length

    def padding_to(self, length: int) -> Tensor | None:
        """`padding` for exactly `length` stored columns."""
        if self.padding is None:
            return None
        grow = length - self.padding.shape[1]
        if grow <= 0:
            return self.padding[:, :length]
        ones = self.padding.new_ones(self.padding.shape[0], grow)
        return torch.cat([self.padding, ones], dim=1)

    def extended(self, stored: int, new: Tensor) -> Tensor:
        """Padding of `stored` columns followed by those of `new` (B, K) bool: (B, stored + K)."""
        before = self.padding_to(stored)
        if before is None:
            before = new.new_ones(new.shape[0], stored)
        return torch.cat([before.to(new.device), new], dim=1)


@dataclass
class PrunedState:
    """What a pruned cache carries."""

    setup: Setup
    """What pruned it, and goes on with it."""
    segments: list[Segment]
    attended: Tensor | None = None
    """(B,) entries that a decoding step attends to, -1: all, 0: as many as published; for methods
    that evict nothing. None: such a method does nothing here."""
    prefix: dict[int, Tensor] = field(default_factory=dict)
    """[layer]: positions (B, P) of text cached earlier, whose keys are to be stored unrotated."""
    heads: dict[int, Tensor] = field(default_factory=dict)
    """[layer]: key heads (B, K) that a row's attention goes through; others: all of them."""
    core: dict[int, CoreMLP] = field(default_factory=dict)
    """[layer]: the part of its MLP that a step of one token passes; others pass all of it."""
    uncroppable: int = 0
    """Physical length of layer 0 below which a dropped token would have to come back."""

    def refine(self, starts: list[int]) -> None:
        """Let segments begin at `starts` too, for a prompt that is cut in other layers."""
        for start in starts:
            if (segment := self.segment(start)).start != start:
                ledger = None if segment.ledger is None else segment.ledger.clone()
                self.segments.append(replace(segment, start=start, ledger=ledger))
                self.segments.sort(key=lambda segment: segment.start)

    def segment(self, layer: int) -> Segment:
        return next(s for s in reversed(self.segments) if s.start <= layer)

    def map_rows(self, function: Any) -> None:
        for segment in self.segments:
            for name in ("padding", "shift", "weights", "ledger"):
                rows = getattr(segment, name)
                if rows is not None:
                    setattr(segment, name, function(rows))
        self.heads = {layer: function(heads) for layer, heads in self.heads.items()}
        if self.attended is not None:
            self.attended = function(self.attended)


class PrunedCacheMixin:
    """Mixed into the class of a cache that holds a pruned prompt."""

    _pruned: PrunedState
    layers: list[Any]

    def _anchor(self, layer_idx: int) -> int:
        """The layer that says how much is stored: one that keeps a state does not."""
        return self._pruned.setup.shape.decoder.attends_at(layer_idx)

    def physical_length(self, layer_idx: int = 0) -> Any:
        """Columns stored by a layer."""
        return super().get_seq_length(self._anchor(layer_idx))  # type: ignore[misc]

    def get_seq_length(self, layer_idx: int = 0) -> Any:
        if not self._pruned.setup.ticket.active:
            raise UnsupportedFeatureError(
                "This cache holds a prompt pruned by a patch that has been removed: patch the "
                "model and run the prompt again, or start with a new cache."
            )
        at = self._anchor(layer_idx)
        return self.physical_length(at) + self._pruned.segment(at).dropped

    def get_query_offset(self, layer_idx: int = 0) -> Any:
        return self.physical_length(layer_idx)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        self._pruned.map_rows(lambda rows: rows.index_select(0, beam_idx.to(rows.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        self._pruned.map_rows(lambda rows: rows.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)  # type: ignore[misc]
        self._pruned.map_rows(lambda rows: rows[indices.to(rows.device)])

    def reset(self) -> None:
        super().reset()  # type: ignore[misc]
        self._pruned.segments = [Segment(s.start) for s in self._pruned.segments]
        self._pruned.attended = None
        self._pruned.core, self._pruned.heads = {}, {}
        self._pruned.uncroppable = 0

    def crop(self, tokens_to_remove: int) -> None:
        left = int(self.physical_length()) - abs(tokens_to_remove)
        if left < self._pruned.uncroppable:
            raise UnsupportedFeatureError(
                f"crop({tokens_to_remove}) reaches into what was pruned, and dropped tokens "
                f"cannot come back: remove at most "
                f"{int(self.physical_length()) - self._pruned.uncroppable} tokens, or run the "
                f"prompt again with a new cache."
            )
        super().crop(tokens_to_remove)  # type: ignore[misc]
        for segment in self._pruned.segments:
            if segment.padding is not None:
                segment.padding = segment.padding[:, : int(self.physical_length(segment.start))]
            if segment.weights is not None:
                segment.weights = segment.weights[:, : int(self.physical_length(segment.start))]
            if segment.ledger is not None:
                segment.ledger[:, 2:] -= abs(tokens_to_remove) * (segment.ledger[:, :1] > 0)


@memoise
def _pruned_class(cls: Any) -> type:
    return type(f"Pruned{cls.__name__}", (PrunedCacheMixin, cls), {})


def pruned_state(cache: Cache | None) -> PrunedState | None:
    """The state of a pruned cache, `None` for any other cache."""
    return cache._pruned if isinstance(cache, PrunedCacheMixin) else None


def is_new(cache: Cache | None) -> bool:
    """Whether a call on the cache begins a prompt: nothing was fed to it, as far as the host knows
    without waiting for the device."""
    if cache is None or not cache.layers:
        return True
    first = next(layer for layer in cache.layers if hasattr(layer, "get_seq_length"))
    stored = first.get_seq_length() if first.is_initialized else 0
    return isinstance(stored, int) and not stored


def make_pruned(cache: Cache, setup: Setup) -> PrunedState:
    """Turn a cache into a pruned one (in place), or let `setup` go on with one that is."""
    state = pruned_state(cache)
    if state is None:
        cache.__class__ = _pruned_class(cache.__class__)
        state = PrunedState(setup, [Segment(start) for start in setup.starts])
        cache._pruned = state  # type: ignore[attr-defined]
    state.setup = setup
    state.refine(setup.starts)
    return state

"""Calls after a pruned prefill: decoding and further text on a cache that stores less.

The caller counts logically (positions, 2-D masks as long as everything it fed); the cache stores
less, and not the same in every layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..cache_names import cache_given
from ..patch_setup import Setup
from ..sequence.masks import STATES, layer_kind, layer_mask, moved_mask, stored_at, tells_length
from .pruned import PrunedState, Segment


@dataclass
class Continued:
    """A call on a shortened cache, without visual tokens."""

    setup: Setup
    cache: Any
    state: PrunedState
    new: int
    """Tokens fed."""
    ids: Tensor | None
    """The caller's position ids of the new tokens; None where no segment has positions of its
    own."""
    _memo: dict[Any, Any] = field(default_factory=dict)
    """What was made for earlier layers."""

    @classmethod
    def begin(cls, state: PrunedState, kwargs: dict[str, Any]) -> Continued:
        """Translate positions and mask of the text model's arguments, in place; what pruned the
        cache goes on with it."""
        setup = state.setup
        embeds, cache = kwargs["inputs_embeds"], cache_given(kwargs)
        mask, ids = kwargs.get("attention_mask"), kwargs.get("position_ids")
        length = embeds.shape[1]
        if ids is not None:
            ids = ids[..., -length:]
        shifted = any(segment.shift is not None for segment in state.segments)
        if shifted and ids is None:
            ids = torch.arange(length, device=embeds.device)[None] + cache.get_seq_length()
        first = state.segments[0].shift
        kwargs["position_ids"] = ids if first is None or ids is None else ids - first.to(ids.device)
        call = cls(setup, cache, state, length, ids if shifted else None)
        if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2):
            return call  # generate() built it for a static cache, or the core did
        kwargs["attention_mask"] = shortened_mask(state, cache, mask, length, embeds.device)
        return call

    def helps(self, layer: int, kwargs: Mapping[str, Any]) -> bool:
        """Whether a layer stores less than the first, for which the model made its mask and its
        rotary tables, and so needs others."""
        segment = self.state.segment(layer)
        if segment.start == 0 or cache_given(kwargs) is not self.cache:
            return False
        if layer_kind(self.setup.config, layer) in STATES:
            return False  # it is told about the new tokens alone
        return self._masked(segment, kwargs) or self.ids is not None

    def layer(self, layer: int, hidden: Tensor, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments of a layer that needs others than those given."""
        segment = self.state.segment(layer)
        new: dict[str, Any] = {}
        if self._masked(segment, kwargs):
            kind = layer_kind(self.setup.config, layer)
            key: tuple[Any, ...] = ("mask", segment.start, kind, hidden.device)
            if key not in self._memo:
                self._memo[key] = self._mask(layer, hidden, segment, key)
            new["attention_mask"] = self._memo[key]
        if self.ids is not None:
            key = ("rotary", self.setup.rotary_kind(layer), hidden.device)
            if key not in self._memo:
                self._memo[key] = self._tables(layer, hidden, self.ids)
            new["position_embeddings"] = self._memo[key][segment.start]
        return {**kwargs, **new}

    def _mask(self, layer: int, hidden: Tensor, segment: Segment, key: tuple[Any, ...]) -> Any:
        config = self.setup.config
        if stored_at(config, layer) != layer:  # on another device than the layers that store
            return moved_mask(self._memo, key)
        length = _mask_length(self.setup, self.cache, hidden.shape[1], layer)
        stored = segment.padding_to(length), self.cache
        return layer_mask(config, layer, hidden, *stored, weights=segment.weights)

    def _tables(self, layer: int, hidden: Tensor, ids: Tensor) -> dict[int, tuple[Tensor, Tensor]]:
        """The rotary tables of all segments by their first layers, for layers of this kind, made
        at once: a decoding step is as long as its launches."""
        rows = (*ids.shape[:-2], len(hidden), ids.shape[-1])
        shifts = [segment.shift for segment in self.state.segments]
        own = [ids if shift is None else ids - shift.to(ids.device) for shift in shifts]
        ids = torch.cat([x.expand(rows) for x in own], -2)
        cos, sin = self.setup.rotary(hidden, ids, layer)
        tables = zip(cos.split(len(hidden)), sin.split(len(hidden)), strict=True)
        starts = (segment.start for segment in self.state.segments)
        return dict(zip(starts, tables, strict=True))

    def _masked(self, segment: Segment, kwargs: Mapping[str, Any]) -> bool:
        given = kwargs.get("attention_mask")
        return any(x is not None for x in (given, segment.padding, segment.weights))


def shortened_mask(
    state: PrunedState, cache: Any, mask: Tensor | None, length: int, device: torch.device
) -> Tensor | None:
    """The 2-D mask of the first layer for a caller's, which covers all that was fed, `length` new
    tokens among it; padding among these is noted."""
    # A single new token is always real; more of them may be padded.
    if mask is not None and length > 1 and not bool(mask[:, -length:].all()):
        new = mask[:, -length:].to(device, torch.bool)
        for segment in state.segments:
            segment.padding = segment.extended(int(cache.physical_length(segment.start)), new)
    return first_padding(state, cache, length)


def first_padding(state: PrunedState, cache: Any, queries: int) -> Tensor | None:
    """The 2-D mask of the first layer, from which generate() builds its own for a static cache."""
    first = state.segment(state.setup.shape.decoder.attends_at(0))
    if first.padding is None:
        return None
    return first.padding_to(_mask_length(state.setup, cache, queries, 0))


def _mask_length(setup: Setup, cache: Any, queries: int, layer: int) -> int:
    """Columns that a mask over stored and new tokens has in `layer`."""
    if tells_length(setup.config, cache):
        return int(cache.physical_length(layer)) + queries
    length, offset = cache.get_mask_sizes(queries, layer)
    return int(length + offset)

"""Entries that leave the KV cache: behind each layer of a prefill, and while decoding."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from ...prune.answers.entries import check_evicted
from ...prune.contract import Compressing, Place
from ..cache.pruned import PrunedState
from ..hooks import Undo, behind
from ..patch_setup import Setup
from ..sequence.layout import Layout, stored_columns
from ..signals.decoder import Heads
from .call import InFlight
from .compression import Compression
from .driver import Driver


class CacheEvictDriver(Driver):
    """Lets the method take entries out of a layer that has just stored a prompt, and out of all
    behind a decoding step."""

    def __init__(self, text: Any, flight: InFlight) -> None:
        self._text, self._flight = text, flight
        self.hooks = {"compress": self._hook_attention}

    def install(self) -> Undo:
        """On the text model at all times, before what ends a call there."""
        return behind(self._text, self._after_text)

    def hear(self, layer: int, heads: Heads) -> None:
        """Queries and keys of a layer, before it stores anything."""
        if (compression := self._compression) is not None:
            compression.hear(heads)

    @property
    def _compression(self) -> Compression | None:
        prefill = self._flight.prefill
        return None if prefill is None else prefill.compression

    def _hook_attention(self, index: int) -> Undo:
        own = functools.partial(self._after_attention, index)
        return behind(self._text.layers[index].self_attn, own, with_kwargs=True)

    @torch.compiler.disable
    def _after_attention(
        self, layer: int, module: nn.Module, args: Any, kwargs: Any, *output: Any
    ) -> None:
        prefill, compression = self._flight.prefill, self._compression
        # Without output another thread is just putting the hook on or taking it off.
        if prefill is not None and compression is not None and output:
            here, batch = prefill.inputs.here(layer), prefill.inputs.batch
            visual = batch.real & ~batch.text
            with batch.images[0].stopwatch:
                compression.after_attention(layer, module, kwargs, here, visual)

    @torch.compiler.disable
    def _after_text(self, module: nn.Module, args: Any, output: Any) -> None:
        prefill, continued = self._flight.prefill, self._flight.continued
        if continued is not None:
            evict(continued.setup, continued.cache, continued.state, continued.new)
        if prefill is not None and (compression := prefill.compression) is not None:
            compression.finish(prefill.inputs, prefill.last)


def evict(setup: Setup, cache: Any, state: PrunedState, new: int) -> None:
    """Let the method remove entries of each row after a step of `new` tokens, as many at most."""
    method = setup.evicting
    if method is not None and type(method).evict is not Compressing.evict:
        _evict(setup, method, cache, state, new)


@torch.no_grad()
def _evict(setup: Setup, method: Compressing, cache: Any, state: PrunedState, new: int) -> None:
    repacks = setup.positions[Place.CACHE] == "repacked"
    stops = [*[s.start for s in state.segments[1:]], len(cache.layers)]
    evicted = False
    for segment, stop in zip(state.segments, stops, strict=True):
        if segment.ledger is None:
            continue
        segment.ledger[:, 2:] += new * (segment.ledger[:, :1] > 0)
        width = int(cache.physical_length(segment.start))
        gone = [_evicted(method, new, width, *row) for row in segment.ledger.tolist()]
        if not any(gone):
            continue
        evicted = True
        attending = setup.shape.decoder.attending
        layers = [cache.layers[n] for n in attending if segment.start <= n < stop]
        device, padding = layers[0].keys.device, segment.padding_to(width)
        if padding is None and all(columns == gone[0] for columns in gone):
            segment.dropped += len(gone[0])
            for layer in layers:
                layer.keys = _without(layer.keys, gone[0])
                layer.values = _without(layer.values, gone[0])
        else:
            layout = _layout_without(padding, gone, width, device)
            segment.padding = layout.padding
            segment.dropped += width - layout.length
            for layer in layers:
                columns = layout.columns.to(layer.keys.device)
                layer.keys = stored_columns(layer.keys, columns)
                layer.values = stored_columns(layer.values, columns)
        counts = torch.tensor([[len(columns)] for columns in gone])
        segment.ledger[:, 2:3] -= counts
        if repacks:
            if segment.shift is None:
                segment.shift = counts.to(device)
            else:
                segment.shift = segment.shift + counts.to(segment.shift.device)
    if evicted:
        state.uncroppable = int(cache.physical_length())


def _evicted(
    method: Compressing, most: int, width: int, prompt: int, kept: int, stored: int, seen: int
) -> list[int]:
    """Columns of a row to remove, `most` at most and ascending: its entries are the last `stored`
    of `width`."""
    left: list[int] = []
    gone: list[int] = []
    while prompt and len(gone) < most:
        stays = stored - len(gone)
        found = method.evict(prompt=prompt, kept=kept, stored=stays, seen=seen)
        slot = check_evicted(method, found, stays)
        if slot is None:
            break
        left = left or list(range(width - stored, width))
        gone.append(left.pop(slot))
    return sorted(gone)


def _layout_without(
    padding: Tensor | None, gone: Sequence[Sequence[int]], width: int, device: torch.device
) -> Layout:
    """What is left of `width` columns without those of each row that are `gone`."""
    if padding is None:
        keep = torch.ones(len(gone), width, dtype=torch.bool, device=device)
    else:
        keep = padding.clone()
    for row, columns in enumerate(gone):
        keep[row, torch.tensor(columns, dtype=torch.long, device=keep.device)] = False
    if padding is None:  # the host knows the counts
        return Layout(keep, [width - len(columns) for columns in gone])
    return Layout.of(keep)


def _without(stored: Tensor, gone: Sequence[int]) -> Tensor:
    """Keys or values (B, H_kv, S, D_head) without the columns `gone`, ascending: the few behind
    them move up in place, the many before stay where they are."""
    length = stored.shape[2]
    moved = torch.cat([stored[:, :, a + 1 : b] for a, b in pairwise([*gone, length])], 2)
    if stored.requires_grad:
        return torch.cat([stored[:, :, : gone[0]], moved], 2)
    left = length - len(gone)
    stored[:, :, gone[0] : left] = moved
    return stored[:, :, :left]

"""Decoding steps that attend to a few of the stored entries.

With re-packed positions keys are stored without their rotation, and turned again for every step to
the places that they have among the entries attended to; with original positions they stay as they
are.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...prune.answers.answer import looks_at_values
from ...prune.answers.entries import check_attended
from ...prune.contract import Place
from ..cache.pruned import PrunedState
from ..hooks import Undo, before
from ..patch_setup import Setup
from ..sequence.layout import stored_columns
from ..tap import Exchange
from .call import InFlight
from .driver import Driver

Tables = tuple[Tensor, Tensor]


class CacheAttendDriver(Driver):
    """Lets the attention of decoding steps compute with what the method picks."""

    def __init__(self, text: Any, flight: InFlight) -> None:
        self._text, self._flight = text, flight
        self.hooks = {"tables": self._hook_tables}

    def exchange(self, layer: int) -> Exchange:
        """What a layer's tap computes with instead."""
        return functools.partial(self._attend, layer)

    def _hook_tables(self, index: int) -> Undo:
        own = functools.partial(self._note_tables, index)
        attention = self._text.layers[index].self_attn
        return before(attention, own, with_kwargs=True)

    @torch.compiler.disable
    def _note_tables(
        self, layer: int, module: nn.Module, args: Any, kwargs: dict[str, Any] | None = None
    ) -> None:
        if kwargs is not None:  # else another thread puts it on or takes it off
            self._flight.tables[layer] = kwargs["position_embeddings"]

    @torch.compiler.disable
    def _attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, mask: Any
    ) -> tuple[Tensor, Tensor, Tensor, Any]:
        flight = self._flight
        at = flight.continued if flight.prefill is None else flight.prefill.inputs
        given = Attention(query, key, value, mask)
        tables = flight.tables.pop(layer, None)
        if tables is not None and at is not None and at.state is not None:
            given = attend(at.setup, at.state, at.cache, layer, given, tables)
        return given.query, given.key, given.value, given.mask


@dataclass(frozen=True)
class Attention:
    """What a layer's attention was about to compute: (B, H | H_kv, Q | S, D_head) and a mask."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Any


def attend(
    setup: Setup, state: PrunedState, cache: Any, layer: int, given: Attention, tables: Tables
) -> Attention:
    """What a step after the prefill attends to instead.

    More than one new token attends to everything. The new keys are the last ones of `given.key`;
    where nothing was stored before them, they are attended to as they are.
    """
    call = setup.on_cache
    method = setup.attending
    if state.attended is None or call is None or method is None:
        return given
    query, key, value = given.query, given.key, given.value
    packed = setup.positions[Place.CACHE] == "repacked"
    new, length = query.shape[2], key.shape[2]
    valid = state.segment(layer).padding_to(length)
    valid = None if valid is None else valid.to(key.device)
    if packed:
        prefix = state.prefix.pop(layer, None)
        prompt = prefix is not None or new == length
        _store_unturned(cache.layers[layer], new, tables, in_place=not prompt)
        if prefix is not None:
            _store_unturned_prefix(setup, layer, cache.layers[layer], prefix)
        if prompt:
            return given  # the prompt sees its own positions
        query, key = _turned_back(query, tables), cache.layers[layer].keys
    picked = None
    if new == 1:
        rows = state.attended
        keep = None if call.budget is None else torch.where(rows < 0, length, rows)
        look = looks_at_values(method, setup.debug)
        found = method.attended(query[:, :, 0], key, valid, keep)
        picked = check_attended(method, key, valid, keep, found, look)
        if picked is not None and keep is None and bool((rows < 0).any()):  # on the CPU
            picked = _or_all(picked, valid, rows < 0, length)
    mask = given.mask
    if picked is not None:
        columns, valid = picked
        key, value = (stored_columns(stored, columns) for stored in (key, value))
        mask = None if valid is None else _mask(setup, valid, query.dtype)
    if packed:
        places = torch.arange(key.shape[2], device=key.device)[None]
        if valid is not None:
            places = (valid.cumsum(1) - 1).clamp_min(0)
        cos, sin = setup.rotary(query, places, layer)
        key = _turned(key, (cos, sin))
        query = _turned(query, (cos[:, -new:], sin[:, -new:]))
    return Attention(query, key, value, mask)


def note_prefix(setup: Setup, state: PrunedState, cache: Any, ids: Tensor, real: Tensor) -> None:
    """Note which positions a text has that was cached before the image came.

    They are taken to be consecutive, up to that of the first new token.

    Args:
        ids: (B | 1, L), the caller's position ids of the new tokens, of which `real` (B, L) count.
    """
    stored = int(cache.physical_length())
    if not stored or setup.attending is None or setup.positions[Place.CACHE] != "repacked":
        return
    valid = state.segments[0].padding_to(stored)
    valid = real.new_ones(len(real), stored) if valid is None else valid
    ids = ids.expand_as(real).masked_fill(~real, torch.iinfo(ids.dtype).max)
    places = ids.amin(1, keepdim=True) - 1 - valid.flip(1).cumsum(1).flip(1) + valid.long()
    state.prefix = dict.fromkeys(range(len(cache.layers)), places.clamp_min(0))


def _or_all(
    picked: tuple[Tensor, Tensor | None], valid: Tensor | None, everything: Tensor, length: int
) -> Tables:
    """What was picked of `length` entries, but all of them for the rows marked in `everything`."""
    columns, counts = picked
    # Columns that do not count may be any: they must not take out one that does.
    counts = torch.ones_like(columns) if counts is None else counts.long()
    found = columns.new_zeros(len(columns), length).scatter_add(1, columns, counts) > 0
    valid = torch.ones_like(found) if valid is None else valid
    found = torch.where(everything.to(valid.device)[:, None], valid, found)
    return torch.arange(length, device=valid.device).expand_as(valid), found


def _store_unturned(stored: Any, new: int, tables: Tables, *, in_place: bool) -> None:
    """Take the rotation off the last `new` keys that a layer stored.

    Args:
        in_place: where nobody reads the turned keys any more; it spares a copy of all others.
    """
    last = _turned_back(stored.keys[:, :, -new:], tables)
    if in_place and not stored.keys.requires_grad:
        stored.keys[:, :, -new:] = last
        return
    stored.keys = torch.cat([stored.keys[:, :, :-new], last], 2)


def _store_unturned_prefix(setup: Setup, layer: int, stored: Any, places: Tensor) -> None:
    """Take the rotation off the first keys that a layer stored, which have `places` (B, P)."""
    keys, count = stored.keys, places.shape[1]
    tables = setup.rotary(keys, places.to(keys.device), layer)
    stored.keys = torch.cat([_turned_back(keys[:, :, :count], tables), keys[:, :, count:]], 2)


def _mask(setup: Setup, valid: Tensor, dtype: torch.dtype) -> Tensor:
    """Which entries one new token of each row sees, as the model's attention wants it."""
    implementation = setup.config._attn_implementation or "eager"
    if "flash" in implementation:
        return valid
    if implementation == "sdpa":
        return valid[:, None, None]
    hidden = torch.zeros(valid.shape, dtype=dtype, device=valid.device)
    return hidden.masked_fill(~valid, torch.finfo(dtype).min)[:, None, None]


def _turned(heads: Tensor, tables: Tables) -> Tensor:
    cos, sin = (table[:, None] for table in tables)
    return heads * cos + _quarter(heads) * sin


def _turned_back(heads: Tensor, tables: Tables) -> Tensor:
    """The inverse of `_turned`, also where the tables are scaled (YaRN)."""
    cos, sin = (table[:, None].float() for table in tables)
    turned = heads.float()
    back = (turned * cos - _quarter(turned) * sin) / (cos * cos + sin * sin)
    return back.to(heads.dtype)


def _quarter(heads: Tensor) -> Tensor:
    """Every pair of coordinates, which are half a head apart, turned by a right angle."""
    low, high = heads.chunk(2, -1)
    return torch.cat([-high, low], -1)

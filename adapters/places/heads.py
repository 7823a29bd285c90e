"""Layers whose attention goes through some of the heads, or reads some of the values.

In a prompt attention is computed with the heads that are left, and the others give zeros; what a
method reads of such a layer is of these heads. Projections are made and entries stored of all, so
that a step of one token computes all and leaves out what they give.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...prune.local_values import attend
from ..signals.decoder import Heads
from ..tap import Around
from .call import InFlight
from .driver import Driver
from .prefill import Prefill

Attention = Callable[..., tuple[Tensor, Tensor | None]]


class HeadsDriver(Driver):
    """What the taps of such layers ask: it has no hooks of its own."""

    def __init__(self, flight: InFlight) -> None:
        self._flight = flight

    def narrowed(self, layer: int, heads: Heads) -> Heads:
        """The heads of a layer that attention goes through in the prompt."""
        prefill, count = self._flight.prefill, heads.key.shape[1]
        kept = None if prefill is None else _kept(prefill, layer, count)
        if kept is None:
            return heads
        query, key, value = _of(kept, heads.query, heads.key, heads.value)
        return replace(heads, query=query, key=key, value=value, share=kept.shape[1] / count)

    def around(self, layer: int) -> Around:
        """What the attention of a layer is computed by."""
        return functools.partial(self._attend, layer)

    @torch.compiler.disable
    def _attend(
        self,
        layer: int,
        attention: Attention,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        prefill, continued = self._flight.prefill, self._flight.continued
        at = prefill or continued
        if at is None or not at.setup.thinned:
            return attention(query, key, value, mask, **kwargs)
        thinned = at.setup.thinned.get(layer)
        if thinned is not None and thinned.values < 1:
            maps = at.setup.config._attn_implementation == "eager"
            attention = functools.partial(_some_values, thinned.values, maps)
        attention = functools.partial(attention, **kwargs)
        count = key.shape[1]
        if prefill is None:
            output, weights = attention(query, key, value, mask)
            kept = None if continued is None else continued.state.heads.get(layer)
            if kept is not None:
                output = output * _alive(kept, query.shape[1], count).to(output)
            return output, weights
        kept = _kept(prefill, layer, count)
        output, weights = _through(kept, attention, query, key, value, mask)
        if layer < at.setup.last_heads:
            prefill.heads.given.append(_given(prefill, output, count))
        return output, weights


def _through(
    kept: Tensor | None, attention: Attention, query: Tensor, key: Tensor, value: Tensor, mask: Any
) -> tuple[Tensor, Tensor | None]:
    """Attention through key heads `kept` (B, K), zeros for the others; None: through all."""
    if kept is None:
        return attention(query, key, value, mask)
    heads = query.shape[1]
    output, weights = attention(*_of(kept, query, key, value), mask)
    number = _queries(kept.to(output.device), heads // key.shape[1])
    output = _spread(output, number, 2, heads)
    return output, None if weights is None else _spread(weights, number, 1, heads)


def _kept(prefill: Prefill, layer: int, count: int) -> Tensor | None:
    """Of `count` key heads those that attention goes through in a layer, (B, K); None: all."""
    setup = prefill.setup
    thinned, method = setup.thinned.get(layer), setup.thinning
    if thinned is None or method is None or (keep := thinned.heads_of(count)) == count:
        return None
    stopwatch = prefill.images[0].stopwatch
    with stopwatch, torch.no_grad(), torch.autocast(stopwatch.device.type, enabled=False):
        kept = prefill.heads.at(layer, method, keep, debug=setup.debug)
    if prefill.inputs.state is not None:
        prefill.inputs.state.heads[layer] = kept
    prefill.last.heads[layer] = kept
    return kept


def _given(prefill: Prefill, output: Tensor, count: int) -> Tensor:
    """Sums of magnitudes of an output (B, L, H, D_head) over tokens, for `count` key heads."""
    real = prefill.inputs.layout.valid[:, -output.shape[1] :].to(output.device)
    found = output.detach().float().abs().sum(-1) * real[:, :, None]
    return found.sum(1).unflatten(1, (count, -1)).sum(-1)


def _queries(kept: Tensor, group: int) -> Tensor:
    """The query heads that read key heads (B, K): (B, K * group)."""
    return (kept[:, :, None] * group + torch.arange(group, device=kept.device)).flatten(1)


def _of(kept: Tensor, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Heads (B, H | H_kv, ...) of each row that are in `kept` (B, K)."""
    kept = kept.to(key.device)
    row = torch.arange(len(kept), device=key.device)[:, None]
    number = _queries(kept, query.shape[1] // key.shape[1])
    return query[row, number], key[row, kept], value[row, kept]


def _spread(narrow: Tensor, number: Tensor, dim: int, count: int) -> Tensor:
    """Heads at `dim` of what was computed, where `number` (B, K) of `count` says; others are 0."""
    shape = [len(number), *[1] * (narrow.dim() - 1)]
    shape[dim] = -1
    whole = narrow.new_zeros([*narrow.shape[:dim], count, *narrow.shape[dim + 1 :]])
    return whole.scatter(dim, number.view(shape).expand_as(narrow), narrow)


def _alive(kept: Tensor, queries: int, keys: int) -> Tensor:
    """1 for query heads that are in, 0 for the others: (B, 1, H, 1)."""
    number = _queries(kept, queries // keys)
    alive = torch.zeros(len(kept), queries, device=kept.device).scatter(1, number, 1)
    return alive[:, None, :, None]


def _some_values(
    share: float,
    maps: bool,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Any,
    *,
    scaling: float,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention that reads a share of the values."""
    return attend(query, key, value, mask, scaling=scaling, share=share, softcap=softcap, maps=maps)

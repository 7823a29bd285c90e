"""A method on the KV cache shortens what the layers of one prefill have stored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...prune.answers.answer import looks_at_values
from ...prune.answers.entries import check_compressed
from ...prune.contract import CacheEntries, Compressing, Place, ReceivedInLayer, Signal
from ...prune.declared import Seen
from ...prune.errors import VlmpruneError
from ..cache.pruned import Segment
from ..cache.report import CacheReport
from ..patch_setup import Setup
from ..report import Last
from ..sequence.batch import Here
from ..sequence.layout import Layout
from ..signals.decoder import Heads, received_in
from .layer_inputs import LayerInputs


@dataclass
class Compression:
    """A method that shortens the cache of one prefill, layer by layer, as soon as a layer ran."""

    setup: Setup
    method: Compressing
    cache: Any
    keeps: list[int | None]
    repeats: int
    """Rows of the batch per sample."""
    _heads: Heads | None = None
    _kept: dict[int, list[Tensor | None]] = field(default_factory=dict)
    """By layer. Those that keep a state have no entries."""
    rows: dict[int, list[tuple[Tensor, Tensor]]] = field(default_factory=dict)
    """Per segment and image, see `CacheReport`."""
    _scores: dict[int, list[Tensor | None]] = field(default_factory=dict)
    _layouts: dict[int, tuple[Layout, list[int]]] = field(default_factory=dict)
    """Per segment: the layout of the new entries that stay, and each row's entries before."""

    @classmethod
    def of(
        cls,
        setup: Setup,
        cache: Any,
        keeps: list[int | None] | None,
        samples: int,
        repeats: int,
    ) -> Compression | None:
        """None where no such method acts."""
        if keeps is None or setup.evicting is None:
            return None
        return cls(setup, setup.evicting, cache, keeps, repeats)

    def hear(self, heads: Heads) -> None:
        """Queries and keys of the layer that runs."""
        self._heads = heads

    @torch.no_grad()
    def after_attention(
        self, layer: int, module: Any, kwargs: Mapping[str, Any], here: Here, visual: Tensor
    ) -> None:
        """Shorten what the layer has just stored.

        Args:
            kwargs: arguments of its attention module.
            visual: (B, L) bool, visual tokens in the caller's sequence.
        """
        heads, self._heads = self._heads, None
        if heads is None:
            raise VlmpruneError(f"Decoder layer {layer} ran without showing its queries and keys.")
        stored, layout, past = self.cache.layers[layer], here.layout, here.past
        marks = layout.shorten(visual)
        keys: list[Tensor] = []
        values: list[Tensor] = []
        kept: list[Tensor | None] = []
        scores: list[Tensor | None] = []
        for row in range(len(stored.keys)):
            sample, first = divmod(row, self.repeats)
            count = layout.counts[row]
            keep = self.keeps[sample]
            own_keys, own_values = stored.keys[row, :, -count:], stored.values[row, :, -count:]
            if keep is None or keep >= count:
                keys.append(own_keys)
                values.append(own_values)
                if not first:
                    kept.append(None)
                    scores.append(None)
                continue
            if not first:
                entries = self._entries(
                    layer, heads, module, kwargs, here, row, marks[row, -count:]
                )
                look = looks_at_values(self.method, self.setup.debug)
                given = self.method.compress(entries, keep)
                chosen = check_compressed(self.method, entries, keep, given, look)
                kept.append(chosen.kept)
                scores.append(chosen.scores)
            keys.append(_kept(chosen.kept, own_keys, chosen.keys))
            values.append(_kept(chosen.kept, own_values, chosen.values))
        self._kept[layer] = kept
        self._scores[layer] = [None if s is None else _noted(s) for s in scores]
        start = self.setup.start_of(layer)
        if start not in self._layouts:
            counts = torch.tensor([part.shape[1] for part in keys], device=visual.device)
            columns = torch.arange(int(counts.max()), device=visual.device)
            valid = columns >= len(columns) - counts[:, None]
            self._layouts[start] = Layout.of(valid), layout.counts
        width = self._layouts[start][0].length
        stored.keys = _right_aligned(stored.keys[:, :, :past], keys, width)
        stored.values = _right_aligned(stored.values[:, :, :past], values, width)

    def _entries(
        self,
        layer: int,
        heads: Heads,
        module: Any,
        kwargs: Mapping[str, Any],
        here: Here,
        row: int,
        visual: Tensor,
    ) -> CacheEntries:
        query = heads.query
        stored, count = self.cache.layers[layer], len(visual)
        signals: dict[Signal, Tensor] = {}
        need = ReceivedInLayer(layer)
        if need in self.method.needs(self.setup.shape):
            signals[need] = received_in(here, row, heads, heads.key)
        cos, sin = kwargs["position_embeddings"]
        at = row if len(cos) > 1 else 0
        return CacheEntries(
            layer=layer,
            keys=stored.keys[row, :, -count:],
            values=stored.values[row, :, -count:],
            queries=query[row, :, -count:],
            visual=visual.to(query.device),
            signals=Seen(self.method, signals),
            attention=module,
            hidden=kwargs["hidden_states"][row, -count:],
            rotary=(cos[at, -count:], sin[at, -count:]),
            sight=here.sight(row, 0, count),
        )

    def finish(self, inputs: LayerInputs, last: Last) -> None:
        """Record what is stored now, in the report and in the cache's state."""
        self._report(last)
        if (state := inputs.state) is None:
            return
        for segment in state.segments:
            if segment.start in self._layouts:  # else its layers keep states
                self._record(segment, inputs)
        anchor = self.setup.start_of(self.setup.shape.decoder.attends_at(0))
        removed = inputs.layouts[anchor].length - self._layouts[anchor][0].length
        state.uncroppable = max(0, state.uncroppable - removed)

    def _report(self, last: Last) -> None:
        depth, samples = self.setup.shape.decoder.num_layers, len(self.keeps)
        none: list[Tensor | None] = [torch.zeros(0, dtype=torch.long)] * samples
        last.entries = [self._kept.get(layer, none) for layer in range(depth)]
        scores = [self._scores.get(layer, [None] * samples) for layer in range(depth)]
        last.cache = CacheReport(
            entries=last.entries,
            scores=scores if self.setup.record else None,
            rows=self.rows,
            image_sample=last.image_sample,
            tokens_in=last.tokens_in,
        )

    def _record(self, segment: Segment, inputs: LayerInputs) -> None:
        """What a segment's layers store now."""
        acted = torch.tensor([keep is not None for keep in self.keeps for _ in range(self.repeats)])
        acted = acted[:, None]
        layout, before = self._layouts[segment.start]
        past = int(self.cache.physical_length(segment.start)) - layout.length
        if segment.padding is not None or layout.padding is not None:
            earlier = segment.padding_to(past)
            if earlier is None:
                earlier = layout.keep.new_ones(len(layout.keep), past)
            segment.padding = torch.cat([earlier.to(layout.keep.device), layout.keep], 1)
        segment.dropped += inputs.layouts[segment.start].length - layout.length
        entries, stay = torch.tensor(before), torch.tensor(layout.counts)
        segment.ledger = torch.stack([entries, stay, stay, entries], 1) * acted
        span = inputs.positions.span()
        if self.setup.positions[Place.CACHE] == "repacked" and span is not None:
            # A new token's position is the number of entries stored before it (counted from the
            # first token's, which is not 0 where the caller counts padding).
            first, following = span
            counted = segment.padding
            if counted is None:
                counted = layout.keep.new_ones(len(layout.keep), past + layout.length)
            stored = counted[:, past:].sum(1, keepdim=True) + first
            unshifted = torch.zeros_like(stored) if segment.shift is None else segment.shift
            segment.shift = torch.where(acted.to(first.device), following - stored, unshifted)


def _noted(scores: Tensor) -> Tensor:
    """Scores (S,) or (H_kv, S) as means over heads."""
    return scores.float().reshape(-1, scores.shape[-1]).mean(0)


def _kept(kept: Tensor, own: Tensor, merged: Tensor | None) -> Tensor:
    """(H_kv, K, D_head) of a row's entries (H_kv, S, D_head)."""
    if merged is not None:
        return merged.to(own)
    kept = kept.to(own.device)
    if kept.dim() == 1:
        return own[:, kept]
    heads = torch.arange(len(own), device=own.device)[:, None]
    return own[heads, kept]  # whole rows; `gather` would take number by number


def _right_aligned(past: Tensor, rows: Sequence[Tensor], width: int) -> Tensor:
    """Columns stored earlier (B, H, P, D), and each row's new ones behind them, padded before."""
    shape = (len(rows), past.shape[1], width, past.shape[3])
    new = past.new_zeros(shape)
    for target, own in zip(new, rows, strict=True):
        target[:, width - own.shape[1] :] = own
    return torch.cat([past, new], 2) if past.shape[2] else new

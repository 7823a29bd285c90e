"""Methods on the KV cache: entries that leave it after prefill, and while decoding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ...prune.answers.answer import looks_at_values
from ...prune.answers.entries import check_compressed, check_evicted
from ...prune.budget import entries_kept
from ...prune.contract import Attending, CacheEntries, Compressing, Place, ReceivedInLayer, Signal
from ...prune.declared import Seen
from ...prune.errors import BudgetError, VlmpruneError
from ..cache.pruned import PrunedState
from ..cache.report import CacheReport
from ..patch_setup import Setup
from ..report import Last
from ..sequence.batch import Here
from ..sequence.layout import Layout, stored_columns
from ..sequence.placed import PlacedImage
from ..signals.decoder import Heads, received_in


def entries_to_keep(
    setup: Setup, images: Sequence[PlacedImage], text_tokens: Sequence[int]
) -> list[int | None] | None:
    """Per sample, the entries that a method on the cache keeps, None where it does nothing; 0: as
    many as it has published.

    None altogether where it does nothing in any of them, or there is none.
    """
    call = setup.on_cache
    if call is None:
        return None
    keeps: list[int | None] = []
    acts = False
    for sample, text in enumerate(text_tokens):
        own = [image.encoded for image in images if image.sample == sample]
        visual = [image.num_tokens for image in own]
        parts = [entries_kept(image.calls[-1], [image.num_tokens], 0) for image in own]
        keep = None if None in parts else text + sum(part or 0 for part in parts)
        if not visual or (keep is not None and keep >= sum(visual) + text):
            keeps.append(None)
        elif keep is not None and isinstance(call.method, Attending) and keep <= call.method.always:
            raise BudgetError(
                f"{call} leaves {keep} of a prompt's {sum(visual) + text} entries, and {call.name} "
                f"attends to {call.method.always} in any case: give a larger budget, or set "
                f"smaller fields ({', '.join(call.method.fields())})."
            )
        else:
            keeps.append(keep or 0)
            acts = True
    return keeps if acts else None


def attend_budget(
    state: PrunedState, keeps: list[int | None] | None, repeats: int, stored: int
) -> None:
    """Note how many entries each row attends to while decoding, for methods that evict nothing.

    Text that was cached before the prompt, in `stored` columns, counts as the prompt's does.
    """
    if keeps is not None:
        keep = torch.tensor(
            [-1 if keep is None else keep for keep in keeps for _ in range(repeats)]
        )
        padding = state.segments[0].padding_to(stored)
        before = torch.tensor(stored) if padding is None else padding.sum(1).to(keep.device)
        state.attended = torch.where(keep > 0, keep + before, keep)


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
    places: dict[int, list[tuple[Tensor, Tensor]]] = field(default_factory=dict)
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
        call = setup.on_cache
        if keeps is None or call is None or not isinstance(call.method, Compressing):
            return None
        return cls(setup, call.method, cache, keeps, repeats)

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

    def finish(
        self,
        state: PrunedState,
        last: Last,
        layout_of: Mapping[int, Layout],
        span: tuple[Tensor, Tensor] | None,
    ) -> None:
        """Record in the cache's state what each segment stores now.

        Args:
            layout_of: per segment, the layout of this prefill.
            span: the caller's positions of the first token and of the next one, (B, 1) each.
        """
        depth, samples = self.setup.shape.decoder.num_layers, len(self.keeps)
        none: list[Tensor | None] = [torch.zeros(0, dtype=torch.long)] * samples
        last.entries = [self._kept.get(layer, none) for layer in range(depth)]
        scores = [self._scores.get(layer, [None] * samples) for layer in range(depth)]
        last.cache = CacheReport(
            entries=last.entries,
            scores=scores if self.setup.record else None,
            places=self.places,
            image_sample=last.image_sample,
            tokens_in=last.tokens_in,
        )
        repacks = self.setup.positions[Place.CACHE] == "repacked"
        acted = torch.tensor([keep is not None for keep in self.keeps for _ in range(self.repeats)])
        acted = acted[:, None]
        for segment in state.segments:
            if segment.start not in self._layouts:  # its layers keep states
                continue
            layout, before = self._layouts[segment.start]
            width = layout_of[segment.start].length
            past = int(self.cache.physical_length(segment.start)) - layout.length
            if segment.padding is not None or layout.padding is not None:
                earlier = segment.padding_to(past)
                if earlier is None:
                    earlier = layout.keep.new_ones(len(layout.keep), past)
                segment.padding = torch.cat([earlier.to(layout.keep.device), layout.keep], 1)
            segment.dropped += width - layout.length
            entries, stay = torch.tensor(before), torch.tensor(layout.counts)
            segment.ledger = torch.stack([entries, stay, stay, entries], 1) * acted
            if repacks and span is not None:
                # A new token's position is the number of entries stored before it (counted from
                # the first token's, which is not 0 where the caller counts padding).
                first, following = span
                counted = segment.padding
                if counted is None:
                    counted = layout.keep.new_ones(len(layout.keep), past + layout.length)
                stored = counted[:, past:].sum(1, keepdim=True) + first
                unshifted = torch.zeros_like(stored) if segment.shift is None else segment.shift
                segment.shift = torch.where(acted.to(first.device), following - stored, unshifted)
        anchor = self.setup.start_of(self.setup.shape.decoder.attends_at(0))
        removed = layout_of[anchor].length - self._layouts[anchor][0].length
        state.uncroppable = max(0, state.uncroppable - removed)


def evict(setup: Setup, cache: Any, state: PrunedState, new: int) -> None:
    """Let the method remove entries of each row after a step of `new` tokens, as many at most."""
    method = setup.on_cache.method if setup.on_cache is not None else None
    if isinstance(method, Compressing) and type(method).evict is not Compressing.evict:
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

"""What a method on the KV cache must compute, the slow and obvious way: one row, no padding, and
plain tensors instead of a cache.

Written against the unpatched model and `transformers` alone; nothing of `vlmprune` is used. Prefill
is the one of `oracle.Truth`, cuts included; every layer's keys and values are kept as they come.
Then new tokens are fed one by one, through attention written by hand.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import torch
from kit.decoder_kinds import head, last_norm, observe
from kit.oracle import Cuts, Truth, decoder_of, plus, projected, turned
from torch import Tensor


@dataclass(frozen=True)
class Entries:
    """What a layer stored of a prompt: S entries. Named as `CacheEntries` of the contract, so that
    a method may be asked what it keeps of them."""

    layer: int
    keys: Tensor  # (H_kv, S, D_head) rotated, like the queries
    values: Tensor  # (H_kv, S, D_head)
    queries: Tensor  # (H, S, D_head)
    visual: Tensor  # (S,) bool
    attention: Any  # the module
    hidden: Tensor  # (S, D) its input
    rotary: tuple[Tensor, Tensor]  # (S, D_head) each
    unturned: Tensor | None  # (H_kv, S, D_head) keys before their rotation; None: not looked at
    mask: Tensor  # (S, S)
    signals: Mapping[Any, Tensor] = field(default_factory=dict)

    @property
    def sight(self) -> Entries:
        return self

    def seen(self, rows: Tensor, count: int) -> Tensor:
        """(R, count) bool, as `Sight` says it."""
        return self.mask[rows, :count] >= 0

    def received(self) -> Tensor:
        """Attention that each entry receives from all rows: head mean, summed over rows: (S,)."""
        keys = shared(self.keys, len(self.queries))
        scores = self.queries @ keys.transpose(1, 2) * self.attention.scaling + self.mask
        return scores.softmax(-1).mean(0).sum(0)


@dataclass(frozen=True)
class Kept:
    """What stays of `Entries`. `kept` is (K,), or (H_kv, K) where key heads have their own entries;
    `keys` and `values` (H_kv, K, D_head) replace those of the kept entries. Named as `Compressed`
    of the contract, which does as well."""

    kept: Tensor
    keys: Tensor | None = None
    values: Tensor | None = None


@dataclass
class Layer:
    """What a layer stores of a row by now."""

    keys: Tensor  # (H_kv, S, D_head) rotated; entries of their own places where steps attend
    values: Tensor
    unturned: Tensor | None  # keys before their rotation; None once entries were removed
    prompt: int  # entries of the prompt
    kept: int  # those that were left of them
    following: int  # position of the token behind the prompt
    acts: bool  # whether the method did anything here
    seen: int = 0  # new tokens so far
    inputs: Tensor | None = None  # (n, D), all that a layer was given which keeps a state

    @property
    def stored(self) -> int:
        return self.keys.shape[1]


Compress = Callable[[int, Entries], Any]
"""(row, entries of a layer) -> `Kept`, its `kept` alone, or None: nothing is done to the layer, and
new tokens have the positions in it that they would have without the method. Where a method acts on
a row, a layer that stores no more than it may keep is one that keeps all, and not None."""
Evict = Callable[..., int | None]
"""`evict(prompt=, kept=, stored=, seen=)` -> the entry to remove after a step, as in the contract:
entries of the prompt in this layer, those left of them, those stored now, and fed so far."""
Attend = Callable[[int, int, Tensor, Tensor], Tensor | None]
"""(row, layer, query (H, D_head), keys (H_kv, S, D_head)) -> ascending numbers of the entries that
a new token attends to, its own (the last) among them; None: all. With original positions both are
rotated, with re-packed ones neither is."""


class CacheTruth:
    """The computation of a batch on an unpatched model whose cache is compressed after prefill, or
    whose new tokens attend to parts of it.

    Args:
        cuts: what leaves the sequence in prefill, and `cut_positions`, as for `Truth`.
        positions: of new tokens. "original": they follow those of the prompt in the layer.
            "repacked": the number of entries stored before it in the layer; with `attend`, the
            entries attended to have 0..k-1 and the new token, the last of them, k-1.
        compress: or what stays, as [row][layer] with entries like those that a `Compress` returns.
        attend: or what is attended to at every step, as [row][layer].
    """

    def __init__(
        self,
        model,
        inputs: dict,
        cuts: Cuts = (),
        positions: str = "original",
        *,
        cut_positions: str | Sequence[str] = "original",
        compress: Compress | Sequence[Sequence[Any]] | None = None,
        evict: Evict | None = None,
        attend: Attend | Sequence[Sequence[Tensor | None]] | None = None,
    ) -> None:
        assert positions in ("original", "repacked")
        assert compress is None or attend is None, "one method on the cache"
        self.model, self.decoder = model, decoder_of(model)
        self.truth = Truth(model, inputs, cuts, cut_positions, by_layer=True)
        self.repacked = positions == "repacked"
        axes = len(self.truth.rows[0].positions)
        assert axes == 1 or not self.repacked, "M-RoPE has no packed positions"
        self.compress = compress
        self.evict = evict
        self.attend = attend
        self.states = any(not hasattr(layer, "self_attn") for layer in self.decoder.layers)
        self._prefilled: dict[int, tuple[Tensor, list[Entries], list[int]]] = {}
        self._compressed: dict[int, list[Layer]] = {}

    # --- prefill ---------------------------------------------------------------------------

    def prefill(self, row: int) -> tuple[Tensor, list[Entries]]:
        """Logits behind the prompt (V,), and the entries of each layer before any compression."""
        logits, entries, _ = self._prefill(row)
        return logits, entries

    @torch.no_grad()
    def _prefill(self, row: int) -> tuple[Tensor, list[Entries], list[int]]:
        if row not in self._prefilled:
            truth, found, following = self.truth, [], []
            visual = torch.cat([*truth.rows[row].images, torch.zeros(0, dtype=torch.long)])
            for number, layer, state, tables, mask in truth.layer_inputs(row, truth.start(row)):
                if self.states:
                    entries, output = _observed(number, layer, state, tables, mask, visual)
                    found.append(entries)
                    following.append(state.following)
                    state.hidden = output
                    continue
                attention, x = layer.self_attn, layer.input_layernorm(state.hidden)
                cos, sin = (table[0] for table in tables)
                query, key, value = (projected(attention, name, x) for name in "qkv")
                entries = Entries(
                    layer=number,
                    keys=turned(attention, key, cos, sin),
                    values=value,
                    queries=turned(attention, query, cos, sin),
                    visual=torch.isin(state.places, visual),
                    attention=attention,
                    hidden=x,
                    rotary=(cos, sin),
                    unturned=key,
                    mask=mask,
                )
                found.append(entries)
                following.append(state.following)
                state.hidden = _finish(
                    layer, state.hidden, entries.queries, entries.keys, value, mask
                )
            logits = head(self.model, last_norm(self.decoder)(state.hidden[-1]))
            self._prefilled[row] = logits, found, following
        return self._prefilled[row]

    def _layers(self, row: int) -> list[Layer]:
        """What each layer stores after prefill."""
        if row not in self._compressed:
            _, entries, following = self._prefill(row)
            pairs = zip(entries, following, strict=True)
            self._compressed[row] = [self._layer(row, *pair) for pair in pairs]
        return [replace(layer) for layer in self._compressed[row]]

    def _layer(self, row: int, entries: Entries, following: int) -> Layer:
        size = entries.keys.shape[1]
        layer = Layer(
            keys=entries.keys,
            values=entries.values,
            unturned=entries.unturned,
            prompt=size,
            kept=size,
            following=following,
            acts=True,
        )
        if entries.attention is None:  # it keeps a state, which nobody touches
            return replace(layer, acts=False, inputs=entries.hidden)
        if self.compress is None:
            return layer
        given = self.compress
        found = given(row, entries) if callable(given) else given[row][entries.layer]
        if found is None:
            return replace(layer, acts=False)
        if isinstance(found, Tensor):
            found = Kept(found)
        return replace(
            layer,
            keys=taken(entries.keys, found.kept) if found.keys is None else found.keys,
            values=taken(entries.values, found.kept) if found.values is None else found.values,
            unturned=None,
            kept=found.kept.shape[-1],
        )

    # --- decoding --------------------------------------------------------------------------

    def decode(self, row: int, tokens: Sequence[int] = (), pieces: Sequence[int] = ()) -> Tensor:
        """Logits behind the prompt and behind each of `tokens`: (1 + T, V).

        Args:
            pieces: how many tokens are fed at once, one after all of these. Those of a piece see
                each other and all that is stored, and as many entries may be evicted after it.
        """
        return self.run(row, tokens, pieces)[0]

    @torch.no_grad()
    def run(
        self, row: int, tokens: Sequence[int] = (), pieces: Sequence[int] = ()
    ) -> tuple[Tensor, list[Layer]]:
        """Logits as `decode`, and what each layer stores in the end."""
        layers = self._layers(row)
        logits = [self.prefill(row)[0][None]]
        left = list(tokens)
        for size in (*pieces, *(1 for _ in left)):
            piece, left = left[:size], left[size:]
            if not piece:
                break
            hidden = self.model.get_input_embeddings()(torch.tensor(piece))
            for number, block in enumerate(self.decoder.layers):
                step = self._own_step if self.states else self._step
                hidden = step(row, number, block, layers[number], hidden)
            logits.append(head(self.model, last_norm(self.decoder)(hidden)))
            for layer in layers:
                for _ in piece:
                    self._evict(layer)
        return torch.cat(logits), layers

    def greedy(self, row: int, steps: int) -> tuple[Tensor, Tensor]:
        """The most likely continuation (steps,), and the logits it was chosen from (steps, V)."""
        tokens: list[int] = []
        for _ in range(steps):
            logits = self.decode(row, tokens)
            tokens.append(int(logits[-1].argmax()))
        return torch.tensor(tokens), logits

    def lengths(self, row: int, tokens: Sequence[int] = ()) -> list[int]:
        """Entries that each layer stores after prefill and `tokens`."""
        return [layer.stored for layer in self.run(row, tokens)[1]]

    def _step(self, row: int, number: int, block, layer: Layer, hidden: Tensor) -> Tensor:
        """One layer on new tokens: hidden (n, D)."""
        attention, x = block.self_attn, block.input_layernorm(hidden)
        query, key, value = (projected(attention, name, x) for name in "qkv")
        at, new = layer.following + layer.seen, len(hidden)
        if self.repacked and layer.acts:
            at = layer.stored
        tables = self._tables(hidden, range(at, at + new))
        layer.keys = torch.cat([layer.keys, turned(attention, key, *tables)], 1)
        layer.values = torch.cat([layer.values, value], 1)
        if layer.unturned is not None:
            layer.unturned = torch.cat([layer.unturned, key], 1)
        layer.seen += new
        mask = torch.full((new, layer.stored), -torch.inf).triu(layer.stored - new + 1)
        if self.attend is None:
            window = getattr(self.decoder.config, "sliding_window", None) or layer.stored
            assert new == 1 or window == layer.stored, "pieces are not cut to windows here"
            seen = layer.keys[:, -window:], layer.values[:, -window:]
            query = turned(attention, query, *tables)
            return _finish(block, hidden, query, *seen, mask[:, -window:])
        keys = layer.unturned if self.repacked else layer.keys
        if not self.repacked:
            query = turned(attention, query, *tables)
        given, chosen = self.attend, None
        if new == 1:
            chosen = (
                given(row, number, query[:, 0], keys) if callable(given) else given[row][number]
            )
        if chosen is None:
            chosen = torch.arange(layer.stored)
        assert chosen[-1] == layer.stored - 1, "the new token does not see itself"
        keys, values = taken(keys, chosen), taken(layer.values, chosen)
        if self.repacked:
            cos, sin = self._tables(hidden, range(len(chosen)))
            keys = turned(attention, keys, cos, sin)
            query = turned(attention, query, cos[-new:], sin[-new:])
        return _finish(block, hidden, query, keys, values, mask[:, -len(chosen) :])

    def _own_step(self, row: int, number: int, block, layer: Layer, hidden: Tensor) -> Tensor:
        """The same through the layer's own modules, where some keep a state: these are given all
        tokens again. Attention is eager, on what is stored."""
        if layer.inputs is not None:
            layer.inputs = torch.cat([layer.inputs, hidden])
            output = block(layer.inputs[None], position_embeddings=None, attention_mask=None)
            return output[0][-len(hidden) :]
        module, new = sys.modules[type(block.self_attn).__module__], len(hidden)
        eager = module.eager_attention_forward
        at = layer.stored if self.repacked and layer.acts else layer.following + layer.seen
        tables = self._tables(hidden, range(at, at + new))
        layer.seen += new

        def attend(attention, query, key, value, mask, **kwargs):
            query, back = query[0], (tables[0], -tables[1])
            layer.keys = torch.cat([layer.keys, key[0]], 1)
            layer.values = torch.cat([layer.values, value[0]], 1)
            if layer.unturned is not None:
                layer.unturned = torch.cat([layer.unturned, turned(attention, key[0], *back)], 1)
            keys, chosen = layer.keys, torch.arange(layer.stored)
            if self.attend is not None:
                assert new == 1, "pieces are not looked at"
                if self.repacked:
                    query, keys = turned(attention, query, *back), layer.unturned
                found = self.attend(row, number, query[:, 0], keys)
                chosen = chosen if found is None else found
            keys = keys[:, chosen]
            if self.attend is not None and self.repacked:
                cos, sin = self._tables(hidden, range(len(chosen)))
                keys = turned(attention, keys, cos, sin)
                query = turned(attention, query, cos[-1:], sin[-1:])
            values = layer.values[None, :, chosen]
            later = torch.full((new, len(chosen)), -torch.inf).triu(len(chosen) - new + 1)
            return eager(attention, query[None], keys[None], values, later[None, None], **kwargs)

        given = tuple(table[None] for table in tables)
        with mock.patch.object(module, "eager_attention_forward", attend):
            output = block(hidden[None], position_embeddings=given, attention_mask=None)
        return output[0]

    def _tables(self, hidden: Tensor, positions: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Cosines and sines of text at these positions, (n, D_head) each."""
        axes = len(self.truth.rows[0].positions)
        ids = torch.tensor(list(positions)).expand(axes, 1, -1)
        cos, sin = self.decoder.rotary_emb(hidden[None], ids if axes > 1 else ids[0])
        return cos[0], sin[0]

    def _evict(self, layer: Layer) -> None:
        if self.evict is None or not layer.acts:
            return
        slot = self.evict(
            prompt=layer.prompt,
            kept=layer.kept,
            stored=layer.stored,
            seen=layer.prompt + layer.seen,
        )
        if slot is not None:
            assert 0 <= slot < layer.stored
            left = torch.tensor([i for i in range(layer.stored) if i != slot])
            layer.keys, layer.values = layer.keys[:, left], layer.values[:, left]
            layer.unturned = None


def _observed(number: int, layer, state, tables, mask: Tensor, visual: Tensor):
    """What a layer stores as its own modules compute it, nothing where it keeps a state; and its
    output (n, D)."""
    cos, sin = (table[0] for table in tables)
    seen = observe(layer, state.hidden, (cos, sin), mask)
    attention = getattr(layer, "self_attn", None)
    nothing = state.hidden[None, :0]
    entries = Entries(
        layer=number,
        keys=nothing if attention is None else seen.keys,
        values=nothing if attention is None else seen.values,
        queries=nothing if attention is None else seen.queries,
        visual=torch.isin(state.places, visual),
        attention=attention,
        hidden=state.hidden if attention is None else seen.attention[0],
        rotary=(cos, sin),
        unturned=None if attention is None else turned(attention, seen.keys, cos, -sin),
        mask=mask,
    )
    return entries, seen.output


def taken(heads: Tensor, kept: Tensor) -> Tensor:
    """Entries (K,), or (H_kv, K) of every head, out of (H_kv, S, D_head)."""
    if kept.dim() == 1:
        return heads[:, kept]
    return torch.stack([head[own] for head, own in zip(heads, kept, strict=True)])


def shared(heads: Tensor, count: int) -> Tensor:
    """Keys or values (H_kv, S, D_head) for each of `count` query heads, neighbours sharing one."""
    return heads.repeat_interleave(count // len(heads), 0)


def _finish(
    block, hidden: Tensor, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | float = 0.0
) -> Tensor:
    """A decoder layer behind its projections: attention, output, MLP; hidden (Q, D)."""
    attention = block.self_attn
    keys, values = shared(keys, len(query)), shared(values, len(query))
    weights = (query @ keys.transpose(1, 2) * attention.scaling + mask).softmax(-1)
    added = attention.o_proj((weights @ values).transpose(0, 1).flatten(1))
    hidden = plus(block, "post_self_attn_layernorm", hidden, added)
    change = block.mlp(block.post_attention_layernorm(hidden)[None])[0]
    return plus(block, "post_mlp_layernorm", hidden, change)


# --- what the papers say, by hand --------------------------------------------------------------


def merged_into_nearest(entries: Entries, kept: Tensor, start: int) -> Kept:
    """Elastic Cache: each dropped entry joins the nearest anchor, the first of two; an anchor's key
    and value are the mean of its own and of those that joined it.

    Args:
        kept: (K,) ascending: `start` first entries, the anchors, and the last entry.
    """
    anchors = kept[start:-1].tolist()
    joined: dict[int, list[int]] = {number: [number] for number in kept.tolist()}
    for number in range(entries.keys.shape[1]):
        if number not in joined and anchors:
            nearest = min(anchors, key=lambda anchor: abs(anchor - number))
            joined[nearest].append(number)
    keys, values = (
        torch.stack([heads[:, joined[number]].mean(1) for number in kept.tolist()], 1)
        for heads in (entries.keys, entries.values)
    )
    return Kept(kept, keys, values)


def votes(query: Tensor, keys: Tensor, *, n_init: int, n_local: int) -> Tensor:
    """TokenSelect: of the entries between the first `n_init` and the last `n_local`, all heads'
    softmaxed products with the query, not scaled, added up."""
    between = range(n_init, keys.shape[1] - n_local)
    group = len(query) // len(keys)
    found = [(keys[n // group, between] @ head).softmax(-1) for n, head in enumerate(query)]
    return torch.stack(found).sum(0)


def soft_vote(
    query: Tensor, keys: Tensor, *, n_init: int, n_local: int, top_k: int
) -> Tensor | None:
    """TokenSelect: the first `n_init` and last `n_local` entries, and the `top_k` between them that
    have most votes; None where that is everything.

    Keys that were never rotated are equal wherever the same word or newline enters the first layer:
    who reads them with other rounding errors finds another one of equals. See `is_soft_vote`.

    Args:
        query: (H, D_head) of the new token. keys: (H_kv, S, D_head), its own last.
    """
    stored = keys.shape[1]
    if n_init + top_k + n_local >= stored:
        return None
    of_each = votes(query, keys, n_init=n_init, n_local=n_local).tolist()
    best = sorted(range(len(of_each)), key=lambda i: (-of_each[i], i))[:top_k]
    chosen = [*range(n_init), *sorted(n_init + i for i in best), *range(stored - n_local, stored)]
    return torch.tensor(chosen)


def is_soft_vote(
    chosen: Tensor,
    query: Tensor,
    keys: Tensor,
    *,
    n_init: int,
    n_local: int,
    top_k: int,
    error: float = 1e-4,
) -> bool:
    """Whether `chosen` (K,) is what `soft_vote` gives, but for votes that differ by `error`."""
    expected = soft_vote(query, keys, n_init=n_init, n_local=n_local, top_k=top_k)
    if expected is None:
        return torch.equal(chosen, torch.arange(keys.shape[1]))
    numbers, wanted = set(chosen.tolist()), set(expected.tolist())
    if chosen.tolist() != sorted(numbers) or len(numbers) != len(wanted):
        return False
    differ = [number - n_init for number in numbers ^ wanted]
    of_each = votes(query, keys, n_init=n_init, n_local=n_local)
    if any(not 0 <= number < len(of_each) for number in differ):
        return False
    threshold = of_each[expected[n_init : len(expected) - n_local] - n_init].min()
    return bool((of_each[differ] - threshold).abs().le(error).all())

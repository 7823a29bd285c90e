"""From what a handle reports to what the oracle must be told: the cuts of a `Truth`."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import vlmprune
from kit import zoo
from kit.cache_oracle import CacheTruth, Entries, is_soft_vote, merged_into_nearest
from kit.encoder_oracle import left_by_encoder
from kit.oracle import Rows, Truth, shared
from vlmprune.prune.contract import Compressing, Place
from vlmprune.prune.methods.cache.token_select import TokenSelect

TOLERANCE = {"atol": 1e-4, "rtol": 1e-4}
"""Peaky random weights amplify rounding: the two orders of operations differ by about 1e-5."""


def features_of(model, inputs: dict) -> list[torch.Tensor]:
    """Features of each image as the model's public encoder functions give them: (N, D)."""
    return [row.embeds[image] for row in Truth(model, inputs).rows for image in row.images]


def rows_that_enter(case: zoo.Case, inputs: dict, model, handle) -> list[Rows]:
    """Of each image, the rows that a method before the LLM lets in: their tokens as the handle
    reports them, their embeddings from the encoder functions of the patched model.

    Rows that were not merged must be their tokens' features on the unpatched model.
    """
    last, found = handle.last, []
    dense = features_of(shared(case.reference(model.config._attn_implementation)), inputs)
    for i, given in enumerate(features_of(model, inputs)):
        order, merged = _entered(last, i)
        embeds = given[Rows(order).slots(len(given))]
        own = (order >= 0) & ~torch.isin(torch.arange(len(embeds)), merged)
        torch.testing.assert_close(embeds[own], dense[i][order[own]], **TOLERANCE)
        found.append(Rows(order, embeds))
    return found


def truth_of(case: zoo.Case, inputs: dict, model, handle) -> Truth:
    """What a patched model must compute of the inputs that it saw last."""
    last, reference = handle.last, shared(case.reference("eager"))
    make = Truth
    if last.stages and last.stages[0].place is Place.ENCODER:
        left = left_by_encoder(case, inputs, model)
        make = left.truth
    rows = [torch.arange(n) for n in last.tokens_in]  # the token of each row alive, -1 for none
    cuts: list = []
    positions: list[str] = []
    for stage in last.stages:
        if stage.place is Place.ENCODER:
            kept = left.rows
            check_left(kept, stage)
        elif stage.layer:
            truth = make(reference, inputs, cuts, positions)
            kept = [_kept(truth, last, stage, i, tokens) for i, tokens in enumerate(rows)]
        elif make is not Truth:  # behind the encoder methods only choose
            kept = stage.kept
        elif any(x is not None for x in (*last.order, *last.groups)):
            kept = rows_that_enter(case, inputs, *_before_llm(case, inputs, model, handle))
        else:
            kept = stage.kept
        rows = [_tokens_of(*pair) for pair in zip(rows, kept, strict=True)]
        cuts = [*cuts, (stage.layer, kept)]
        # As it was before stages said so: decoder cuts left positions as they were.
        word = last.positions if stage.layer == 0 else "original"
        positions = [*positions, getattr(stage, "positions", word)]
    truth = make(reference, inputs, cuts, positions)
    inside = [call for call in handle.methods if call.method.place is Place.DECODER]
    weighing = {call.name for call in inside if call.method.proportional}
    truth.weighs = [stage.method in weighing for stage in last.stages]
    truth.below = [stage.below for stage in last.stages]
    return truth


def check_left(rows: Sequence[Rows], stage) -> None:
    """What the encoder left is what the stage reports."""
    for of_image, kept, order in zip(rows, stage.kept, stage.order, strict=True):
        assert torch.equal(of_image.order, kept if order is None else order)


def _said(stage, name: str, i: int):
    """What a stage says of an image under a name; None where it says nothing."""
    said = getattr(stage, name, None)
    return said[i] if said else None


def _entered(last, i: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens of the rows of an image that entered the LLM, -1 for none; which were merged."""
    first, order, pairs = None, last.order[i], last.members[i]
    if last.stages and last.stages[0].layer == 0:
        first = last.stages[0]
        if getattr(first, "order", None):
            order, pairs = first.order[i], first.groups[i]
    if order is None:
        order = last.kept[i] if first is None else first.kept[i]
    return order, order[:0] if pairs is None else pairs[0]


def _before_llm(case: zoo.Case, inputs: dict, model, handle):
    """The model and its handle; of the first method alone, where the handle no longer says what
    entered the LLM."""
    first = handle.last.stages[0]
    if getattr(first, "order", None) or len(handle.last.stages) == 1:
        return model, handle
    model = case.model(model.config._attn_implementation)
    handle = vlmprune.patch(model, handle.methods[0])
    with torch.no_grad():
        model(**inputs)
    return model, handle


def _tokens_of(tokens: torch.Tensor, kept: torch.Tensor | Rows) -> torch.Tensor:
    """The tokens of the rows behind a cut, given those of the rows before it."""
    if not isinstance(kept, Rows):
        return kept
    none = torch.cat([tokens, torch.tensor([-1])])
    return none[kept.order]


def _kept(truth: Truth, last, stage, i: int, tokens: torch.Tensor) -> torch.Tensor | Rows:
    """What a cut in the decoder keeps of an image, whose rows before it are `tokens` or -1."""
    order, pairs = _said(stage, "order", i), _said(stage, "groups", i)
    if order is None:
        order = torch.isin(tokens, stage.kept[i]).nonzero()[:, 0]
        if pairs is None and bool((tokens.diff(prepend=torch.tensor([-1])) > 0).all()):
            return stage.kept[i]  # no row was ever moved or merged
        if bool((tokens < 0).any()):
            order = _with_others(truth, last, stage, i, tokens, order)
    if pairs is None:
        return Rows(order)
    return Rows(order, members=[pairs[1, pairs[0] == row] for row in range(len(order))])


def _with_others(truth: Truth, last, stage, i: int, tokens, order) -> torch.Tensor:
    """Of rows that are no token nothing is reported: as many stay as the count says, those that the
    last token reads most."""
    entered = [s.keep for s in last.plans[i] if s.layer <= stage.layer]
    count = entered[-1] if entered else last.tokens_in[i]
    scores = [s for b in range(len(truth.rows)) for s in truth.last_row(b, stage.layer - 1)][i]
    others = scores.masked_fill(tokens >= 0, -1).topk(count - len(order)).indices
    return torch.cat([order, others]).sort().values


@dataclass(frozen=True, kw_only=True)
class Noted(TokenSelect):
    """TokenSelect that notes what it was asked, row by row, and what it answered.

    Keys that were never rotated are equal wherever the same word enters the first layer, and
    another order of operations finds another one of equals. So the oracle goes on with what was
    chosen here, having looked at it by itself.
    """

    notes: list = field(default_factory=list, compare=False)

    def attended(self, query, keys, valid, keep):
        found = super().attended(query, keys, valid, keep)
        for row, stored in enumerate(keys):
            count = length = stored.shape[1]
            if valid is not None:
                count = int(valid[row].sum())
            chosen = None
            if found is not None:
                chosen = found[0][row] if found[1] is None else found[0][row][found[1][row]]
                chosen = chosen - (length - count)
            self.notes.append((query[row].clone(), _mean(keys[row, :, -count:]), count, chosen))
        return found

    def answer(self, query: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """What was chosen of keys (H_kv, S, D_head) for a query (H, D_head)."""
        stored, mean = keys.shape[1], _mean(keys)
        found = [
            chosen
            for asked, of_keys, count, chosen in self.notes
            if count == stored
            and torch.allclose(asked, query, atol=1e-3, rtol=1e-3)
            and torch.allclose(of_keys, mean, atol=1e-3, rtol=1e-3)
        ]
        assert found, "the engine never asked for this token"
        return torch.arange(stored) if found[-1] is None else found[-1]

    def reader(self, entries: Sequence[int | None]):
        """What `CacheTruth` is told, given the entries that each row may attend to; None: all."""

        def attend(row: int, layer: int, query, keys):
            if entries[row] is None:
                return None
            chosen = self.answer(query, keys)
            sizes = {"n_init": self.n_init, "n_local": self.n_local}
            assert is_soft_vote(chosen, query, keys, **sizes, top_k=entries[row] - self.always)
            return chosen

        return attend


def _mean(keys: torch.Tensor) -> torch.Tensor:
    """Tells keys (H_kv, S, D_head) from others."""
    return keys.mean(1)


def entries_of(last, call) -> list[int | None]:
    """Entries of each prompt that a method on the cache keeps or attends to; None without image."""
    found: list[int | None] = [None] * len(last.text_tokens)
    for count, sample in zip(last.tokens_in, last.image_sample, strict=True):
        before = last.text_tokens[sample] if found[sample] is None else found[sample]
        ratio = call.budget.word == "keep_ratio"
        share = max(1, round(call.budget.value * count)) if ratio else call.budget.value
        found[sample] = before + min(count, int(share))
    return found


class OnCache(Truth):
    """A `Truth` whose new tokens meet a cache that a method works on."""

    pieces: Sequence[int] = ()
    """How many new tokens are fed at once, one by one after all of these."""

    def __init__(self, cached: CacheTruth) -> None:
        self.__dict__.update(vars(cached.truth))
        self.cached = cached

    def next_logits(self, row: int, new_ids: Sequence[int] = ()) -> torch.Tensor:
        return self.cached.decode(self.numbers[id(self.rows[row])], new_ids, self.pieces)

    @functools.cached_property
    def numbers(self) -> dict[int, int]:
        """The row of the batch that each row is, for those who reorder `rows`."""
        return {id(row): b for b, row in enumerate(self.cached.truth.rows)}

    def layer_lengths(self, row: int) -> list[int]:
        return self.cached.lengths(row)


def cached_truth(case: zoo.Case, inputs: dict, model, handle, attended=None) -> OnCache:
    """What a patched model with a method on the cache must compute of the inputs that it saw last.

    Args:
        attended: the entries that a new token attends to, as `CacheTruth` is told, for methods that
            let it attend to some; None: all.
    """
    method, last, truth = handle.methods[-1].method, handle.last, None
    if last.stages:
        truth = truth_of(case, inputs, model, handle)
    entries, options = last.entries, {}
    if isinstance(method, Compressing):
        rows = range(len(last.text_tokens))
        acts = [any(layer[b] is not None for layer in entries) for b in rows]

        fed = [
            [text + visual for visual in layers]
            for text, layers in zip(last.text_tokens, last.tokens_per_layer, strict=True)
        ]

        def compress(row: int, stored: Entries):
            kept, before = entries[stored.layer][row], stored.keys.shape[1] - fed[row][stored.layer]
            if kept is None:
                return torch.arange(stored.keys.shape[1]) if acts[row] else None
            if before:  # a text prefix, stored earlier
                prefix = torch.arange(before).expand(*kept.shape[:-1], -1)
                return torch.cat([prefix, kept + before], -1)
            if handle.methods[-1].name == "elastic_cache":
                return merged_into_nearest(stored, kept, method.start_size)
            return kept

        options = {"compress": compress if entries else lambda *_: None, "evict": method.evict}
    elif attended is not None:
        options = {"attend": attended}
    cached = CacheTruth(
        shared(case.reference("eager")),
        inputs,
        truth.cuts if truth else (),
        handle._engine.setup.positions[Place.CACHE],
        cut_positions=[stage.positions for stage in last.stages],
        **options,
    )
    if isinstance(method, Noted) and attended is None:
        allowed = entries_of(last, handle.methods[-1])
        for row, entered in enumerate(cached.truth.rows):
            visual = zip(last.tokens_in, last.image_sample, strict=True)
            prompt = last.text_tokens[row] + sum(n for n, sample in visual if sample == row)
            if allowed[row] is not None:  # and all of a text prefix, stored earlier
                allowed[row] += len(entered.ids) - prompt
        cached.attend = method.reader(allowed)
    return OnCache(cached)

"""The references themselves, against what `transformers` computes on the unpatched model:
`cache_oracle.CacheTruth`, and what `oracle.Truth` knows of cuts inside the decoder."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
import torch
from kit import zoo
from kit.cache_oracle import (
    CacheTruth,
    Entries,
    Kept,
    is_soft_vote,
    merged_into_nearest,
    soft_vote,
    taken,
)
from kit.oracle import Rows, Truth, decoder_of
from kit.paths import TESTS
from kit.reported import TOLERANCE
from transformers import DynamicCache
from vlmprune.adapters.cache_names import CACHE

STEPS = 4
TOKENS = [7, 50, 11, 90]
POSITIONS = pytest.mark.parametrize(
    ("case", "positions"),
    [
        pytest.param(case, word, id=f"{case.name}-{word}")
        for case in zoo.WHOLE_CASES
        for word in ("original", "repacked")
        if word == "original" or not case.fixed_positions
    ],
)


def positions_and(name: str, words: Iterable[Any]):
    """Both kinds of positions, and in each the words as `zoo.by_turns` deals them."""
    words = list(words)
    cells = [
        pytest.param(case, kind, word, id=f"{case.name}-{kind}-{word}")
        for kind in ("original", "repacked")
        for case, word in zoo.by_turns(zoo.WHOLE_CASES, words)
        if kind == "original" or not case.fixed_positions
    ]
    return pytest.mark.parametrize(("case", "positions", name), cells)


PACKED = pytest.mark.parametrize(
    "case", [c for c in zoo.WHOLE_CASES if not c.fixed_positions], ids=lambda case: case.name
)
ROW = (zoo.TWO,)
GOLDEN = TESTS / "golden"


@functools.cache
def greedy(case: zoo.Case) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens (B, STEPS) and logits (STEPS, B, V) of the unpatched model."""
    out = case.reference("sdpa").generate(
        **case.inputs(zoo.BATCH),
        max_new_tokens=STEPS,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return out.sequences[:, -STEPS:], torch.stack(out.logits)


def all_entries(row: int, entries: Entries) -> torch.Tensor:
    return torch.arange(entries.keys.shape[1])


def all_keys(row, layer, query, keys) -> torch.Tensor:
    return torch.arange(keys.shape[1])


NOTHING = {
    "dense": {},
    "compress": {"compress": all_entries},
    "per-head": {"compress": lambda row, e: all_entries(row, e).expand(len(e.keys), -1)},
    "untouched": {"compress": lambda row, entries: None},
    "evict": {"compress": all_entries, "evict": lambda **counts: None},
    "attend": {"attend": all_keys},
    "attend-default": {"attend": lambda *given: None},
    "vote": {"attend": lambda *given: soft_vote(*given[2:], n_init=2, n_local=3, top_k=999)},
}


# --- nothing removed ---------------------------------------------------------------------------


@positions_and("method", NOTHING)
def test_with_nothing_removed_it_is_the_unpatched_model(case, positions, method):
    tokens, logits = greedy(case)
    given = case.inputs(zoo.BATCH)
    truth = CacheTruth(case.reference("eager"), given, positions=positions, **NOTHING[method])
    for row, new in enumerate(tokens.tolist()):
        found = truth.decode(row, new[:-1])
        torch.testing.assert_close(found, logits[:, row], **TOLERANCE)
        length = int(given["attention_mask"][row].sum()) + STEPS - 1
        assert truth.lengths(row, new[:-1]) == [length] * 4
    if method == "dense":
        assert torch.equal(truth.greedy(1, STEPS)[0], tokens[1])


def test_sliding_windows_are_seen_while_decoding():
    case = zoo.SLIDING
    tokens, logits = greedy(case)
    truth = CacheTruth(case.reference("eager"), case.inputs(zoo.BATCH))
    for row, new in enumerate(tokens.tolist()):
        torch.testing.assert_close(truth.decode(row, new[:-1]), logits[:, row], **TOLERANCE)


# --- cuts, with and without a cache ------------------------------------------------------------

CUTS = {
    "before-original": [(0, "original")],
    "before-repacked": [(0, "repacked")],
    "decoder-original": [(2, "original")],
    "decoder-repacked": [(2, "repacked")],
    "mixed": [(0, "original"), (1, "repacked"), (2, "original"), (3, "repacked")],
    "mixed-first": [(0, "repacked"), (1, "original"), (3, "repacked")],
    "everything": [(1, "original"), (3, "repacked")],
}


def kept_at(case: zoo.Case, number: int, last: bool, name: str) -> list[torch.Tensor]:
    """Fewer at every cut, a subset of the one before."""
    if name == "everything" and last:
        return [torch.zeros(0, dtype=torch.long) for _ in case.counts(zoo.BATCH)]
    return [torch.arange(0, count, 2 ** (number + 1)) for count in case.counts(zoo.BATCH)]


def cuts_of(case: zoo.Case, name: str):
    cuts, words = [], []
    for number, (layer, word) in enumerate(CUTS[name]):
        cuts.append((layer, kept_at(case, number, number == len(CUTS[name]) - 1, name)))
        words.append("original" if case.fixed_positions else word)
    return cuts, words


@zoo.turns("name", CUTS, zoo.WHOLE_CASES)
def test_decoding_with_stored_keys_agrees_with_no_cache(case, name):
    """New tokens at positions of their own in every layer, against the whole sequence at once."""
    cuts, words = cuts_of(case, name)
    model, inputs = case.reference("eager"), case.inputs(zoo.BATCH)
    plain = Truth(model, inputs, cuts, words)
    cached = CacheTruth(model, inputs, cuts, cut_positions=words)
    for row in range(len(zoo.BATCH)):
        expected = plain.next_logits(row, TOKENS)
        torch.testing.assert_close(cached.decode(row, TOKENS), expected, **TOLERANCE)
        assert cached.lengths(row) == plain.layer_lengths(row)
    dense, other = Truth(model, inputs), Truth(model, inputs, cuts, ["original"] * len(cuts))
    assert (dense.next_logits(0) - plain.next_logits(0)).abs().max() > 0.3
    if "repacked" in words:
        assert (other.next_logits(0, TOKENS) - plain.next_logits(0, TOKENS)).abs().max() > 0.05


@zoo.FAMILIES
@pytest.mark.parametrize("layer", [0, 2])
def test_cuts_that_leave_nothing_of_an_image(case, layer):
    """As if the image were not in the sequence, from this layer on."""
    model, inputs = case.reference("eager"), case.inputs(ROW)
    counts = case.counts(ROW)
    kept = [torch.zeros(0, dtype=torch.long), torch.arange(counts[1])]
    truth = Truth(model, inputs, [(layer, kept)])
    spec = truth.rows[0]
    gone = len(spec.ids) - counts[0]
    assert truth.layer_lengths(0) == [len(spec.ids)] * layer + [gone] * (4 - layer)
    assert not truth.alive(0)[spec.images[0]].any() and truth.alive(0)[spec.images[1]].all()
    assert truth.full_logits(0).shape[0] == len(spec.ids)
    if layer == 0 and not spec.deep:
        alive = truth.alive(0)
        ids = spec.positions[:, None, alive]
        hidden = truth.decoder(
            inputs_embeds=spec.embeds[None, alive],
            position_ids=ids if len(ids) > 1 else ids[0],
            attention_mask=torch.ones(1, gone),
        ).last_hidden_state
        torch.testing.assert_close(truth.next_logits(0)[0], model.lm_head(hidden)[0, -1])
    attention = truth.last_row(0, 3)
    assert [len(row) for row in attention] == [0, counts[1]]


# --- rows merged inside the decoder ------------------------------------------------------------


def entering(case: zoo.Case, inputs: dict, layer: int) -> torch.Tensor:
    """Hidden states of one prompt that enter a layer of the unpatched model: (L, D)."""
    model, seen = case.reference("eager"), []
    block = decoder_of(model).layers[layer]
    hook = block.register_forward_pre_hook(lambda module, given: seen.append(given[0][0]))
    try:
        model(**inputs)
    finally:
        hook.remove()
    return seen[0]


@POSITIONS
@pytest.mark.parametrize("layer", [1, 2, 3])
def test_rows_merged_in_the_decoder(case, positions, layer):
    """Against hidden states that the unpatched model gives out, cut, merged and sent through its
    other layers here."""
    model, inputs = case.reference("eager"), case.inputs(zoo.SINGLE)
    (count,) = case.counts(zoo.SINGLE)
    order = torch.tensor([5, 2, -1, 9, -1])
    members = [torch.tensor(of, dtype=torch.long) for of in ([], [2, 3], [0, 1], [], [7, 9, 4])]
    truth = Truth(model, inputs, [(layer, [Rows(order, members=members)])], [positions])
    (image,) = truth.rows[0].images
    slots = [0, 1, 2, 5, 9]
    alive = truth.alive(0)
    assert alive[image].nonzero()[:, 0].tolist() == slots

    length = len(alive)
    ids = truth.rows[0].positions.clone()
    hidden = entering(case, inputs, layer)
    patches = hidden[image]
    rows = [
        patches[5],
        (patches[2] + patches[3]) / 2,
        (patches[0] + patches[1]) / 2,
        patches[9],
        (patches[7] + patches[9] + patches[4]) / 3,
    ]
    hidden = hidden.index_copy(0, image[slots], torch.stack(rows))[alive]
    # Positions: of tokens 5, 2 and 9, and where a row is no token, of its slot (2 and 9).
    ids[:, image[slots]] = ids[:, image[[5, 2, 2, 9, 9]]]
    ids = ids[:, alive]
    deep = [d.index_copy(0, image[slots], d[image[[5, 2, 2, 9, 9]]]) for d in truth.rows[0].deep]
    if positions == "repacked":
        ids = torch.arange(ids.shape[1])[None]
    tables = truth.decoder.rotary_emb(hidden[None], ids[:, None] if len(ids) > 1 else ids)
    mask = torch.full((len(hidden), len(hidden)), -1e9).triu(1)[None, None]
    for number in range(layer, 4):
        block = truth.decoder.layers[number]
        hidden = block(hidden[None], attention_mask=mask, position_embeddings=tables)[0]
        if number < len(deep):
            hidden = hidden + deep[number][alive]
    expected = model.lm_head(truth.decoder.norm(hidden[-1]))
    torch.testing.assert_close(truth.next_logits(0)[0], expected, **TOLERANCE)
    assert truth.layer_lengths(0) == [length] * layer + [length - count + 5] * (4 - layer)

    cached = CacheTruth(model, inputs, truth.cuts, cut_positions=[positions])
    found = cached.decode(0, TOKENS)
    torch.testing.assert_close(found, truth.next_logits(0, TOKENS), **TOLERANCE)


@zoo.BOTH_FAMILIES
def test_merged_rows_are_cut_and_merged_again(case):
    """Rows are numbered as they are before each cut; the mean of all members, composed, is the same
    in one go where no layer is between."""
    model, inputs = case.reference("eager"), case.inputs(zoo.SINGLE)
    first = Rows(
        torch.tensor([8, -1, 10, -1]),
        members=[torch.tensor(of, dtype=torch.long) for of in ([], [1, 3], [], [0, 4])],
    )
    second = Rows(
        torch.tensor([2, -1]),
        members=[torch.tensor(of, dtype=torch.long) for of in ([], [1, 3])],
    )
    once = Rows(
        torch.tensor([10, -1]),
        members=[torch.tensor(of, dtype=torch.long) for of in ([], [0, 1, 3, 4])],
    )
    words = ["original" if case.fixed_positions else "repacked"]
    two = Truth(model, inputs, [(2, [first]), (2, [second])], words * 2)
    one = Truth(model, inputs, [(2, [once])], words)
    if not case.fixed_positions:
        torch.testing.assert_close(two.next_logits(0, [5]), one.next_logits(0, [5]), **TOLERANCE)
    (image,) = two.rows[0].images
    # Slots 8, 10 and the first two; then of these rows the third, which is in slot 8, and slot 0.
    assert two.alive(0)[image].nonzero()[:, 0].tolist() == [0, 8]
    apart = Truth(model, inputs, [(1, [first]), (3, [second])], words * 2)
    assert (apart.next_logits(0) - one.next_logits(0)).abs().max() > 0.01
    plain = Truth(model, inputs, [(1, [first]), (3, [image[[1, 8]] - image[0]])], words * 2)
    assert plain.alive(0)[image].nonzero()[:, 0].tolist() == [1, 8]
    kept = Truth(model, inputs, [(1, [first]), (3, [Rows(torch.tensor([1, 2]))])], words * 2)
    torch.testing.assert_close(plain.next_logits(0), kept.next_logits(0), **TOLERANCE)


# --- entries removed ---------------------------------------------------------------------------


def by_transformers(case, rows, layers, at, evicted) -> torch.Tensor:
    """Logits behind each of TOKENS, through the unpatched language model and a `DynamicCache` whose
    tensors are exchanged: `layers` (keys, values) after prefill, `evicted` a slot after each step;
    `at` positions of the new tokens."""
    model = case.reference("eager")
    decoder, cache = decoder_of(model), DynamicCache(config=None)
    with torch.no_grad():
        model(**case.inputs(rows), **{CACHE: cache}, use_cache=True)
    logits = []
    for stored, (keys, values) in zip(cache.layers, layers, strict=True):
        stored.keys, stored.values = keys(stored.keys[0])[None], values(stored.values[0])[None]
    for token, position, slot in zip(TOKENS, at, evicted, strict=True):
        ids = torch.tensor([[position]])
        hidden = decoder(
            inputs_embeds=model.get_input_embeddings()(torch.tensor([[token]])),
            position_ids=ids.expand(3, 1, 1) if case.fixed_positions else ids,
            **{CACHE: cache},
            use_cache=True,
        ).last_hidden_state
        logits.append(model.lm_head(hidden)[0, -1])
        for stored in cache.layers if slot is not None else ():
            left = [i for i in range(stored.keys.shape[2]) if i != slot]
            stored.keys, stored.values = stored.keys[:, :, left], stored.values[:, :, left]
    return torch.stack(logits)


def drawn(entries: Entries, per_head: bool) -> torch.Tensor:
    """Half of the entries by chance, others in every layer, and the first and the last."""
    draw = torch.Generator().manual_seed(entries.layer)
    heads, size, _ = entries.keys.shape
    noise = torch.rand(heads if per_head else 1, size, generator=draw)
    noise[:, [0, -1]] = 2
    kept = noise.topk(size // 2).indices.sort().values
    return kept if per_head else kept[0]


def compressed(kind: str):
    def compress(row: int, entries: Entries):
        kept = drawn(entries, kind == "per-head")
        return merged_into_nearest(entries, kept, 1) if kind == "merged" else kept

    return compress


@positions_and("removed", itertools.product(["same", "per-head", "merged"], ["keep", "evict"]))
def test_removed_entries_against_the_cache_of_transformers(case, positions, removed):
    kind, evicts = removed[0], removed[1] == "evict"
    slots = [None, 3, 1, None] if evicts else [None] * 4
    asked: list[dict[str, int]] = []

    def evict(**counts: int) -> int | None:
        asked.append(counts)
        return slots[(len(asked) - 1) // 4]  # four layers at every step

    model, inputs = case.reference("eager"), case.inputs(ROW)
    truth = CacheTruth(model, inputs, positions=positions, compress=compressed(kind), evict=evict)
    logits, layers = truth.run(0, TOKENS)
    _, entries = truth.prefill(0)
    size = entries[0].keys.shape[1]
    half = size // 2
    assert asked[0] == {"prompt": size, "kept": half, "stored": half + 1, "seen": size + 1}
    assert asked[-1]["seen"] == size + 4 and asked[-1]["stored"] == half + 4 - 2 * evicts

    def exchange(number: int, name: str):
        kept = compressed(kind)(0, entries[number])
        if isinstance(kept, Kept):
            return lambda stored: getattr(kept, name)
        return lambda stored: taken(stored, kept)

    start = truth.truth.rows[0].next_position if positions == "original" else half
    gone = [0, 0, 1, 2] if evicts and positions == "repacked" else [0] * 4
    at = [start + step - less for step, less in enumerate(gone)]
    exchanged = [(exchange(i, "keys"), exchange(i, "values")) for i in range(4)]
    expected = by_transformers(case, ROW, exchanged, at, slots)
    torch.testing.assert_close(logits[1:], expected, **TOLERANCE)
    assert [layer.stored for layer in layers] == [half + 4 - 2 * evicts] * 4

    dense = CacheTruth(model, inputs).decode(0, TOKENS)
    torch.testing.assert_close(logits[0], dense[0])
    assert (logits[1:] - dense[1:]).abs().amax(1).min() > 0.3
    if kind == "same":
        given = [[drawn(one, False).expand(len(one.keys), -1) for one in entries]]
        again = CacheTruth(model, inputs, positions=positions, compress=given)
        if not evicts:
            torch.testing.assert_close(again.decode(0, TOKENS), logits)


@zoo.BOTH_FAMILIES
def test_rows_and_layers_that_are_left_alone(case):
    """None: the layer keeps everything, its positions and all that is evicted elsewhere."""
    model, inputs = case.reference("eager"), case.inputs(zoo.BATCH)
    dense, asked = CacheTruth(model, inputs), []

    def evict(**counts):
        asked.append(counts)
        return 1

    some = CacheTruth(
        model,
        inputs,
        compress=lambda row, e: drawn(e, False) if (row, e.layer) == (1, 2) else None,
        evict=evict,
    )
    for row in (0, 2):
        assert torch.equal(some.decode(row, TOKENS), dense.decode(row, TOKENS))
    assert not asked
    size = dense.lengths(1)[0]
    assert some.lengths(1, TOKENS) == [size + 4, size + 4, size // 2, size + 4]
    assert len(asked) == 4


@zoo.BOTH_FAMILIES
def test_compression_after_cuts_counts_the_entries_of_each_layer(case):
    model, inputs = case.reference("eager"), case.inputs(zoo.BATCH)
    cuts, words = cuts_of(case, "mixed")
    plain = CacheTruth(model, inputs, cuts, cut_positions=words)
    same = CacheTruth(model, inputs, cuts, cut_positions=words, compress=all_entries)
    half = CacheTruth(
        model, inputs, cuts, cut_positions=words, compress=lambda row, e: drawn(e, False)
    )
    before = [e.keys.shape[1] for e in plain.prefill(0)[1]]
    assert before == plain.truth.layer_lengths(0) and len(set(before)) == 4
    assert half.lengths(0) == [size // 2 for size in before]
    assert [int(e.visual.sum()) for e in plain.prefill(0)[1]] == [
        size - int((~zoo.is_visual(plain.truth.rows[0].ids)).sum()) for size in before
    ]
    expected = plain.decode(0, TOKENS)
    torch.testing.assert_close(same.decode(0, TOKENS), expected)
    assert (half.decode(0, TOKENS)[1:] - expected[1:]).abs().max() > 0.3


def test_repacked_positions_count_what_is_stored_behind_gaps():
    """Of a layer in which the method does nothing, new tokens follow the prompt's positions."""
    case = zoo.CASES["llava-clip-llama"]
    model, inputs = case.reference("eager"), case.inputs(zoo.BATCH)
    cuts, _ = cuts_of(case, "before-original")
    plain = CacheTruth(model, inputs, cuts)
    alone = CacheTruth(model, inputs, cuts, "repacked", compress=lambda row, entries: None)
    acts = CacheTruth(model, inputs, cuts, "repacked", compress=all_entries)
    for row in (0, 1):
        expected = plain.decode(row, TOKENS)
        assert torch.equal(alone.decode(row, TOKENS), expected)
        assert (acts.decode(row, TOKENS)[1:] - expected[1:]).abs().max() > 0.05
    assert torch.equal(acts.decode(2, TOKENS), plain.decode(2, TOKENS)), "no image, no gaps"


@zoo.WHOLE
def test_entries_are_those_that_transformers_stores(case):
    model, inputs = case.reference("eager"), case.inputs(ROW)
    cache = DynamicCache()
    with torch.no_grad():
        out = model(**inputs, **{CACHE: cache}, use_cache=True, output_attentions=True)
    truth = CacheTruth(model, inputs)
    everything = zip(truth.prefill(0)[1], cache.layers, out.attentions, strict=True)
    for entries, stored, attention in everything:
        torch.testing.assert_close(entries.keys, stored.keys[0], **TOLERANCE)
        torch.testing.assert_close(entries.values, stored.values[0], **TOLERANCE)
        torch.testing.assert_close(
            entries.received(), attention[0].mean(0).sum(0), atol=1e-4, rtol=1e-3
        )
        assert torch.equal(entries.visual, zoo.is_visual(inputs["input_ids"][0]))
        rope = model.model.language_model.config.rope_parameters
        width = int(entries.keys.shape[2] * rope.get("partial_rotary_factor", 1))
        shape = (len(entries.visual), width)
        assert entries.rotary[0].shape == entries.rotary[1].shape == shape


# --- several tokens at once --------------------------------------------------------------------


@POSITIONS
@pytest.mark.parametrize("method", ["dense", "compress", "attend"])
def test_tokens_fed_at_once_are_those_fed_one_by_one(case, positions, method):
    options = {
        "dense": {},
        "compress": {"compress": lambda row, entries: drawn(entries, False)},
        "attend": {"attend": all_keys},
    }[method]
    truth = CacheTruth(case.reference("eager"), case.inputs(ROW), positions=positions, **options)
    expected = truth.decode(0, TOKENS)
    for pieces in ((4,), (1, 3), (2,), (3, 9)):
        torch.testing.assert_close(truth.decode(0, TOKENS, pieces), expected, **TOLERANCE)


@POSITIONS
def test_entries_are_evicted_after_all_tokens_of_a_piece(case, positions):
    model, inputs = case.reference("eager"), case.inputs(ROW)
    options = {"positions": positions, "compress": all_entries}
    plain = CacheTruth(model, inputs, **options)
    size = plain.lengths(0)[0]
    bounded = CacheTruth(
        model,
        inputs,
        evict=lambda *, stored, **counts: 3 if stored > size else None,
        **options,
    )
    expected = plain.decode(0, TOKENS)
    found, layers = bounded.run(0, TOKENS, [3])
    torch.testing.assert_close(found[:4], expected[:4], **TOLERANCE)
    assert (found[4] - expected[4]).abs().max() > 0.05
    assert [layer.stored for layer in layers] == [size] * 4
    assert (bounded.decode(0, TOKENS)[2:4] - expected[2:4]).abs().amax(1).min() > 0.05


@zoo.BOTH_FAMILIES
def test_several_tokens_attend_to_everything(case):
    model, inputs = case.reference("eager"), case.inputs(ROW)
    truth = CacheTruth(model, inputs, attend=some_entries)
    plain = CacheTruth(model, inputs)
    found, expected = truth.decode(0, TOKENS, [3]), plain.decode(0, TOKENS)
    torch.testing.assert_close(found[:4], expected[:4], **TOLERANCE)
    assert (found[4] - expected[4]).abs().max() > 0.05


# --- entries attended to -----------------------------------------------------------------------


def some_entries(row, layer, query, keys) -> torch.Tensor:
    """A rule that transformers can follow through a mask: others at every step."""
    stored = keys.shape[1]
    return torch.tensor([i for i in range(stored) if i % 3 != stored % 3 or i == stored - 1])


@zoo.WHOLE
def test_attended_entries_against_a_mask(case):
    """Original positions: the whole sequence at once, and new rows see only some columns."""
    model, inputs = case.reference("eager"), case.inputs(ROW)
    truth = CacheTruth(model, inputs, attend=some_entries)
    dense = truth.truth
    state, spec = dense.start(0, TOKENS), dense.rows[0]
    prompt, length = len(spec.ids), len(state.places)
    sees = torch.ones(length, length).tril().bool()
    for new in range(prompt, length):
        sees[new] = False
        sees[new, some_entries(0, 0, None, torch.zeros(1, new + 1, 1))] = True
    mask = torch.zeros(length, length).masked_fill(~sees, -1e9)[None, None]
    axes = state.positions[:, None]
    visual = zoo.is_visual(torch.cat([spec.ids, torch.tensor(TOKENS)]))
    deep = {
        "visual_pos_masks": visual[None],
        "deepstack_visual_embeds": [rows[visual] for rows in state.deep],
    }
    hidden = dense.decoder(
        **(deep if state.deep else {}),
        inputs_embeds=state.hidden[None],
        position_ids=axes if len(axes) > 1 else axes[0],
        attention_mask=mask,
        use_cache=False,
    ).last_hidden_state
    expected = model.lm_head(hidden)[0, prompt - 1 :]
    found = truth.decode(0, TOKENS)
    torch.testing.assert_close(found, expected, **TOLERANCE)
    plain = CacheTruth(model, inputs).decode(0, TOKENS)
    assert (found[1:] - plain[1:]).abs().amax(1).min() > 0.3


@PACKED
def test_packed_entries_against_keys_turned_on(case):
    """Re-packed positions: one step through a `DynamicCache` of the entries, whose rotated keys are
    turned by the distance that each of them moves."""
    model, inputs = case.reference("eager"), case.inputs(ROW)
    truth = CacheTruth(model, inputs, positions="repacked", attend=some_entries)
    prompt = len(truth.truth.rows[0].ids)
    chosen = some_entries(0, 0, None, torch.zeros(1, prompt + 1, 1))[:-1]
    moves = torch.arange(len(chosen)) - chosen
    cos, sin = truth.decoder.rotary_emb(torch.zeros(1), moves[None])

    def turn(stored: torch.Tensor) -> torch.Tensor:
        one, two = stored[:, chosen].chunk(2, -1)
        c, s = cos[0].chunk(2, -1)[0], sin[0].chunk(2, -1)[0]
        return torch.cat([one * c - two * s, two * c + one * s], -1)

    exchanged = [(turn, lambda stored: stored[:, chosen])] * 4
    at = [len(chosen) + step for step in range(4)]
    expected = by_transformers(case, ROW, exchanged, at, [None] * 4)[0]
    found = truth.decode(0, TOKENS)
    torch.testing.assert_close(found[1], expected, **TOLERANCE)
    other = CacheTruth(model, inputs, attend=some_entries).decode(0, TOKENS)
    assert (found[1:] - other[1:]).abs().max() > 0.05
    _, layers = truth.run(0, TOKENS)
    assert [layer.stored for layer in layers] == [prompt + 4] * 4


@zoo.BOTH_FAMILIES
def test_given_entries_are_attended_to_at_every_step(case):
    model, inputs = case.reference("eager"), case.inputs(ROW)
    size = len(CacheTruth(model, inputs).truth.rows[0].ids)
    given = [[torch.arange(layer, size + 1) for layer in range(4)]]
    called = CacheTruth(model, inputs, attend=lambda row, layer, q, k: given[row][layer])
    listed = CacheTruth(model, inputs, attend=given)
    assert torch.equal(called.decode(0, TOKENS[:1]), listed.decode(0, TOKENS[:1]))
    with pytest.raises(AssertionError, match="itself"):
        listed.decode(0, TOKENS)


# --- what the papers say -----------------------------------------------------------------------


def test_the_vote_is_that_of_the_official_code():
    """On the case in which every query head has keys of its own."""
    data = np.load(GOLDEN / "tokenselect__n1500_k256_mha.npz")
    query, keys = torch.from_numpy(data["q"])[0], torch.from_numpy(data["k"]).transpose(0, 1)
    found = soft_vote(query.float(), keys.float(), n_init=8, n_local=32, top_k=256)
    assert found.tolist() == data["kept"].tolist()
    assert soft_vote(query, keys, n_init=8, n_local=32, top_k=1460) is None
    assert len(soft_vote(query, keys, n_init=8, n_local=32, top_k=1459)) == 1499


def test_the_vote_by_hand():
    keys = torch.tensor([[[9.0], [1], [0], [2], [0], [9]], [[9.0], [0], [1], [0], [0], [9]]])
    query = torch.tensor([[1.0], [1.0], [1.0], [10.0]])  # heads 0, 1 -> keys 0; 2, 3 -> keys 1
    one = soft_vote(query, keys, n_init=1, n_local=1, top_k=1)
    two = soft_vote(query, keys, n_init=1, n_local=1, top_k=2)
    assert one.tolist() == [0, 2, 5] and two.tolist() == [0, 2, 3, 5]
    same = soft_vote(query, torch.zeros_like(keys), n_init=2, n_local=2, top_k=1)
    assert same.tolist() == [0, 1, 2, 4, 5], "ties go to the lower index"


def test_votes_that_are_equal_may_fall_either_way():
    keys = torch.tensor([[[9.0], [1], [0], [1], [0], [9]]])
    sizes = {"n_init": 1, "n_local": 1, "top_k": 1}

    def good(*chosen: int) -> bool:
        return is_soft_vote(torch.tensor(chosen), torch.ones(2, 1), keys, **sizes)

    assert good(0, 1, 5) and good(0, 3, 5)
    assert not any([good(0, 2, 5), good(0, 1, 3, 5), good(0, 5), good(1, 3, 5), good(0, 1, 3)])
    assert not good(0, 5, 1) and not good(0, 1, 1, 5)
    everything = {**sizes, "top_k": 4}
    assert is_soft_vote(torch.arange(6), torch.ones(2, 1), keys, **everything)
    assert not is_soft_vote(torch.arange(5), torch.ones(2, 1), keys, **everything)


def test_dropped_entries_join_the_nearest_anchor_by_hand():
    case = zoo.CASES["llava-clip-mistral"]
    (entries, *_) = CacheTruth(case.reference("eager"), case.inputs((zoo.NONE,))).prefill(0)[1]
    kept = torch.tensor([0, 1, 4, 8])  # of 9: start 0, anchors 1 and 4, the last
    found = merged_into_nearest(entries, kept, 1)
    for before, after in ((entries.keys, found.keys), (entries.values, found.values)):
        expected = [
            before[:, 0],
            before[:, [1, 2]].mean(1),  # 2 is nearer to 1, 3 to 4; 5, 6 and 7 have nothing nearer
            before[:, [3, 4, 5, 6, 7]].mean(1),
            before[:, 8],
        ]
        torch.testing.assert_close(after, torch.stack(expected, 1))
    found = merged_into_nearest(entries, torch.tensor([0, 2, 4, 8]), 1)
    torch.testing.assert_close(found.keys[:, 1], entries.keys[:, [1, 2, 3]].mean(1))  # a tie
    found = merged_into_nearest(entries, torch.tensor([0, 8]), 1)
    torch.testing.assert_close(found.keys, entries.keys[:, [0, 8]])

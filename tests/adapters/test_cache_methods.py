"""Methods on the KV cache, on every model: they equal the slow computation of
`cache_oracle.CacheTruth`, and do nothing where nothing is to be done."""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
import vlmprune
from kit import skips, zoo
from kit.cache_oracle import CacheTruth, Entries
from kit.decoder_kinds import stored_lengths
from kit.decoding import SMALL, STEPS, call_of, generated, logits_of
from kit.reported import TOLERANCE, OnCache, cached_truth, entries_of
from transformers import DynamicCache
from vlmprune.adapters.cache_names import CACHE
from vlmprune.prune.budget import MethodCall
from vlmprune.prune.contract import Compressing, ReceivedInLayer
from vlmprune.prune.methods.cache.visual_press import VisualPress
from vlmprune.prune.registry import method_class

NAMES = [*zoo.ON_CACHE, "visual_press:knorm", "visual_press:received"]
METHODS = pytest.mark.parametrize("name", NAMES)
POSITIONS = pytest.mark.parametrize(
    ("case", "positions"),
    [
        pytest.param(case, word, id=f"{case.name}-{word}")
        for case in zoo.WHOLE_CASES
        for word in ("original", "repacked")
        if word == "original" or not case.fixed_positions
    ],
)
CLIP, QWEN = zoo.CASES["llava-clip-llama"], zoo.CASES["qwen2_5_vl"]


def check(case: zoo.Case, inputs: dict, model, handle) -> OnCache:
    """Logits of every step, what the layers store in the end, and the lengths that callers see."""
    out = generated(model, inputs)
    truth = cached_truth(case, inputs, model, handle)
    if isinstance(handle.methods[-1].method, Compressing):
        check_entries(handle, truth)
    stored = []
    for row, tokens in enumerate(out.sequences[:, -STEPS:].tolist()):
        expected, layers = truth.cached.run(row, tokens[:-1])
        torch.testing.assert_close(logits_of(out)[:, row], expected, **TOLERANCE)
        assert expected.argmax(-1).tolist() == tokens
        stored.append([layer.stored for layer in layers])
    layers = out[CACHE].layers
    most = [max(of_layer) for of_layer in zip(*stored, strict=True)]
    assert stored_lengths(out[CACHE]) == most
    assert [layer.values.shape[2] for layer in layers if hasattr(layer, "values")] == [
        count for layer, count in zip(layers, most, strict=True) if hasattr(layer, "values")
    ]
    logical = inputs["input_ids"].shape[1] + STEPS - 1
    lengths = [out[CACHE].get_seq_length(i) for i in range(len(layers))]
    assert lengths == [logical] * len(layers)
    return truth


def check_entries(handle, truth: OnCache) -> None:
    """What stays in each layer is what the method keeps of the entries as they should be."""
    last, call = handle.last, handle.methods[-1]
    assert len(last.entries) == len(truth.decoder.layers)
    for sample, keep in enumerate(entries_of(last, call)):
        for entries, of_layer in zip(truth.cached.prefill(sample)[1], last.entries, strict=True):
            kept, stored = of_layer[sample], entries.keys.shape[1]
            if entries.attention is None:  # a state, and no entries
                assert not len(kept)
                continue
            if keep is None or keep >= stored:
                assert kept is None
                continue
            assert kept.shape[-1] == keep
            assert bool((kept.diff(dim=-1) > 0).all()) and kept.min() >= 0 and kept.max() < stored
            received = {ReceivedInLayer(entries.layer): entries.received()}
            entries = replace(entries, signals=received)
            expected = call.method.compress(entries, keep).kept
            assert torch.equal(kept, expected) or as_good(call, entries, kept, expected)


def as_good(call: MethodCall, entries: Entries, kept, expected) -> bool:
    """Newlines are equal where they enter, and so are the lengths of their keys."""
    if call.method.fields().get("press") != "knorm":
        return False
    lengths = entries.keys.norm(dim=-1)
    one, two = (lengths.gather(1, found).sort().values for found in (kept, expected))
    return torch.allclose(one, two, atol=1e-5)


# --- nothing to be done ------------------------------------------------------------------------


def run(model, inputs: dict):
    with torch.no_grad():
        logits = model(**inputs).logits
    out = generated(model, inputs, steps=3)
    return logits, out.sequences, logits_of(out), stored_lengths(out[CACHE])


@functools.cache
def dense(case: zoo.Case, rows: tuple, attention: str = "sdpa"):
    return run(case.reference(attention), case.inputs(rows))


def same(found, expected) -> bool:
    return all(map(torch.equal, found[:3], expected[:3])) and found[3] == expected[3]


ALONE = ("sdpa", zoo.SINGLE, {"keep_ratio": 1.0})
PADDED = ("sdpa", zoo.BATCH, {"keep_ratio": 1.0})
EAGER = ("eager", zoo.BATCH, {"keep_tokens": 10**6})


@pytest.mark.parametrize(
    ("case", "attention", "rows", "budget", "name"),
    [
        pytest.param(case, *how, name, id=f"{name}-{case.name}-{word}")
        for case in zoo.CASES.values()
        for word, how in {"single": ALONE, "batch": PADDED, "eager": EAGER}.items()
        if how is PADDED or case in (CLIP, QWEN)
        for name in zoo.asked(case, NAMES)
    ],
)
def test_keeping_everything_is_the_unpatched_model_bit_for_bit(case, attention, rows, budget, name):
    model = case.model(attention)
    handle = vlmprune.patch(model, [call_of(name, **budget)])
    assert same(run(model, case.inputs(rows)), dense(case, rows, attention))
    assert handle.last.entries == [] and handle.last.pruned is False


@zoo.BOTH_FAMILIES
@METHODS
@pytest.mark.parametrize("other", ["divprune", "fastv"])
def test_keeping_everything_beside_another_method_is_that_method_alone(case, name, other):
    """Also longer than the window: everything is what the budget says."""
    found = []
    for calls in ([], [call_of(name, keep_ratio=1.0)]):
        model = case.model()
        vlmprune.patch(model, [vlmprune.method(other, keep_ratio=0.5), *calls])
        found.append(run(model, case.inputs(zoo.BATCH)))
    assert same(*found)


@POSITIONS
@pytest.mark.parametrize("fields", [{}, SMALL["token_select"]], ids=["published", "small"])
def test_prompts_shorter_than_the_window_attend_to_everything(case, positions, fields):
    model = case.model()
    vlmprune.patch(model, "token_select", positions=positions, **fields)
    for rows in (zoo.SINGLE, zoo.BATCH):
        found, expected = run(model, case.inputs(rows)), dense(case, rows)
        assert torch.equal(found[1], expected[1]) and found[3] == expected[3]
        torch.testing.assert_close(found[0][:, -1], expected[0][:, -1], **TOLERANCE)
        torch.testing.assert_close(found[2], expected[2], **TOLERANCE)


@zoo.turns("name", NAMES, zoo.WHOLE_CASES)
def test_text_alone_is_the_unpatched_model_bit_for_bit(case, name):
    model, rows = case.model(), (zoo.NONE, (4,))
    vlmprune.patch(model, call_of(name, keep_ratio=0.2))
    for _ in range(2):
        assert same(run(model, case.inputs(rows)), dense(case, rows))
        generated(model, case.inputs(zoo.BATCH), steps=2)


# --- against the oracle ------------------------------------------------------------------------


def cells(positions: str) -> Iterator[tuple[zoo.Case, str]]:
    """Of the first families by turns; of the others one method of each kind, where it lies."""
    for case, name in zoo.by_turns(zoo.WHOLE_CASES, NAMES):
        if positions == "original" or not case.fixed_positions:
            yield case, name
    for case in zoo.OTHER_CASES if positions == "original" else ():
        yield from ((case, name) for name in zoo.asked(case, NAMES))


@pytest.mark.parametrize(
    ("case", "positions", "name"),
    [
        pytest.param(case, word, name, id=f"{name}-{case.name}-{word}")
        for word in ("original", "repacked")
        for case, name in cells(word)
    ],
)
def test_every_step_equals_the_oracle(case, positions, name):
    model = case.model()
    handle = vlmprune.patch(model, call_of(name, keep_ratio=0.4), positions=positions)
    alone: dict[zoo.Row, list] = {}
    for rows in (zoo.SINGLE, zoo.BATCH):
        if rows == zoo.BATCH or case in (CLIP, QWEN):
            truth = check(case, case.inputs(rows), model, handle)
        else:  # without padding it is one code path on all of them
            with torch.no_grad():
                model(**case.inputs(rows))
        assert handle.last.tokens_kept == case.counts(rows), "the prefill sees everything"
        for b, row in enumerate(rows):
            kept = [layer[b] for layer in handle.last.entries]
            for one, two in zip(alone.setdefault(row, kept), kept, strict=True):
                assert one is two is None or torch.equal(one, two), "depends on the batch"
    plain = CacheTruth(case.reference("eager"), case.inputs(zoo.BATCH))
    for b, row in enumerate(zoo.BATCH if name != "token_select" else ()):
        moved = (truth.cached.decode(b, [5, 9]) - plain.decode(b, [5, 9])).abs().amax(1)
        assert moved[0] < 1e-4, "the prefill is not touched"
        assert moved[1] > 0.05 if zoo.images([row]) else moved[1] < 1e-4


@zoo.turns("name", NAMES, zoo.WHOLE_CASES)
def test_counts_under_eager_attention_with_the_positions_of_the_method(case, name):
    model = case.model("eager")
    handle = vlmprune.patch(model, call_of(name, keep_tokens=7))
    check(case, case.inputs(zoo.BATCH), model, handle)
    own = method_class(name.partition(":")[0]).positions
    expected = "original" if case.fixed_positions else own
    assert handle.positions == handle.last.positions == expected


@pytest.mark.parametrize("name", zoo.ON_CACHE)
@pytest.mark.parametrize("case", [QWEN, zoo.CASES["llava_onevision"]], ids=lambda case: case.name)
def test_videos(case, name):
    model = case.model()
    handle = vlmprune.patch(model, call_of(name, keep_ratio=0.3))
    check(case, case.inputs(zoo.MIXED), model, handle)


def test_entries_are_evicted_while_decoding():
    """Else the tests of this file would say nothing about it."""
    model = CLIP.model()
    handle = vlmprune.patch(model, call_of("elastic_cache", keep_ratio=0.4))
    truth = check(CLIP, CLIP.inputs(zoo.BATCH), model, handle)
    for row, kept in enumerate(entries_of(handle.last, handle.methods[0])[:2]):
        assert kept + 2 <= truth.cached.lengths(row, [5] * (STEPS - 1))[0] <= kept + STEPS - 3


@zoo.turns("name", NAMES, zoo.WHOLE_CASES)
def test_a_batch_mate_changes_no_sample(case, name):
    """With original positions, where no two keys are equal."""
    model = case.model()
    vlmprune.patch(model, call_of(name, keep_ratio=0.3), positions="original")
    together = generated(model, case.inputs(zoo.BATCH))
    for b, row in enumerate(zoo.BATCH):
        alone = generated(model, case.inputs((row,)))
        assert torch.equal(alone.sequences[0, -STEPS:], together.sequences[b, -STEPS:])
        pair = logits_of(alone)[:, 0], logits_of(together)[:, b]
        torch.testing.assert_close(*pair, **TOLERANCE)


@zoo.BOTH_FAMILIES
@pytest.mark.parametrize("budget", [{"keep_ratio": 0.2}, {}], ids=["budget", "published"])
@pytest.mark.parametrize("positions", ["original", None])
def test_a_long_text_attends_to_everything_beside_an_image(case, budget, positions):
    """As it does alone."""
    rows, model = ((70,), zoo.ONE), case.model()
    call = vlmprune.method("token_select", n_init=2, n_local=3, top_k=20, **budget)
    vlmprune.patch(model, call, positions=positions)
    together = logits_of(generated(model, case.inputs(rows)))
    expected = logits_of(generated(case.reference(), case.inputs(rows)))
    torch.testing.assert_close(together[:, 0], expected[:, 0], **TOLERANCE)
    assert (together - expected)[1:, 1].abs().max() > 0.05, "the other attends to a few"
    alone = logits_of(generated(model, case.inputs(rows[1:])))
    torch.testing.assert_close(together[:, 1:], alone, **TOLERANCE)


# --- at all places at once ---------------------------------------------------------------------

COMPOSITIONS = {
    "divprune+pyramiddrop+elastic_cache": (0.7, 0.5, 0.2),
    "merging+fastv+visual_press": (0.6, 0.4, 0.2),
    "fastv+token_select": (0.5, 0.2),
    "sparsevlm+elastic_cache": (0.5, 0.2),
    "spatten+token_select": (0.5, 0.2),
    "merging+transprune+visual_press:received": (0.6, 0.4, 0.1),
    "merging+sparsevlm+token_select": (0.6, 0.5, 0.1),
}


def composed(case: zoo.Case, name: str) -> list[MethodCall]:
    """The methods; "merging": one before the LLM that merges rows, and moves them where it can."""
    calls = []
    for one, ratio in zip(name.split("+"), COMPOSITIONS[name], strict=True):
        if one == "merging" and case.shape.tower.has_cls:
            calls.append(vlmprune.method("visionzip", keep_ratio=ratio, scores="cls"))
        else:
            calls.append(call_of("pool" if one == "merging" else one, keep_ratio=ratio))
    return calls


def compositions() -> Iterator[tuple[zoo.Case, str, str]]:
    """All of them on a family of each kind of positions, and one by turns on every other."""
    by_turns = itertools.cycle(COMPOSITIONS)
    for case in zoo.WHOLE_CASES:
        for positions in ["original"] if case.fixed_positions else ["original", "repacked"]:
            for name in COMPOSITIONS if case in (CLIP, QWEN) else [next(by_turns)]:
                yield case, positions, name


@pytest.mark.parametrize(
    ("case", "positions", "name"),
    [pytest.param(*one, id=f"{one[2]}-{one[0].name}-{one[1]}") for one in compositions()],
)
def test_methods_at_several_places(case, positions, name):
    model = case.model()
    handle = vlmprune.patch(model, composed(case, name), positions=positions)
    check(case, case.inputs(zoo.BATCH), model, handle)


@zoo.BOTH_FAMILIES
@pytest.mark.parametrize("name", COMPOSITIONS)
def test_methods_at_several_places_with_their_own_positions(case, name):
    model = case.model("eager")
    handle = vlmprune.patch(model, composed(case, name))
    check(case, case.inputs(zoo.BATCH), model, handle)


# --- what happens to the cache afterwards ------------------------------------------------------

EVERYWHERE = {name: [call_of(name, keep_ratio=0.15)] for name in zoo.ON_CACHE}
EVERYWHERE["all places"] = [
    vlmprune.method("divprune", keep_ratio=0.7),
    vlmprune.method("fastv", keep_ratio=0.4, layer=2),
    call_of("elastic_cache", keep_ratio=0.25),
]
EVERYWHERE["votes behind a cut"] = [
    vlmprune.method("fastv", keep_ratio=0.4, layer=2),
    call_of("token_select", keep_ratio=0.15),
]
LISTS = pytest.mark.parametrize("which", EVERYWHERE)
ONE_FAMILY_EACH = pytest.mark.parametrize(
    ("case", "which"),
    [
        pytest.param(case, which, id=f"{which}-{case.name}".replace(" ", "_"))
        for number, which in enumerate(EVERYWHERE)
        for case in ((CLIP, QWEN) if zoo.EVERY_CELL else [(CLIP, QWEN)[number % 2]])
    ],
)


def positions_of(case: zoo.Case, which: str) -> list[str | None]:
    """None, the positions of each method, is one of the others where there is one method."""
    if case.fixed_positions:
        return ["original"]
    return ["original", "repacked", *([None] if len(EVERYWHERE[which]) > 1 else [])]


def test_rows_that_see_each_other_both_ways_are_asked_as_they_see():
    case = zoo.CASES["paligemma"]
    model, inputs = case.model(), case.inputs(zoo.BATCH)
    for keep in (0.3, 0.4, 0.5):
        handle = vlmprune.patch(model, "visual_press", keep_ratio=keep)
        truth = check(case, inputs, model, handle)
        handle.remove()
    first, *_ = truth.cached.prefill(0)[1]
    assert bool((first.mask.triu(1) == 0).all()), "every row sees the whole prompt"
    causal = replace(first, mask=first.mask + torch.full_like(first.mask, -torch.inf).triu(1))
    found = [VisualPress().compress(one, 30).scores for one in (first, causal)]
    assert not torch.allclose(*found, atol=1e-5)


@ONE_FAMILY_EACH
def test_a_second_question_is_fed_at_once(case, which):
    """Entries are evicted behind all of it, as many as the budget wants."""
    rows = len(zoo.BATCH)
    for positions in positions_of(case, which):
        model, inputs = case.model(), case.inputs(zoo.BATCH)
        handle = vlmprune.patch(model, EVERYWHERE[which], positions=positions)
        first = generated(model, inputs, steps=3)
        question = torch.tensor([[5, 17, 60, 9, 33, 70]] * rows)
        ids = torch.cat([first.sequences, question], 1)
        mask = torch.cat([inputs["attention_mask"], torch.ones(rows, 9).long()], 1)
        given = {"input_ids": ids, "attention_mask": mask}
        second = generated(model, given, **{CACHE: first[CACHE]})
        truth = cached_truth(case, inputs, model, handle)
        for row in range(rows):
            tokens = second.sequences[row, inputs["input_ids"].shape[1] :].tolist()
            expected, layers = truth.cached.run(row, tokens[:-1], (1, 1, 7))
            found = logits_of(second)[:, row]
            torch.testing.assert_close(found, expected[-STEPS:], **TOLERANCE)
            if which == "elastic_cache" and row < 2:
                kept = layers[0].kept / layers[0].prompt
                assert layers[0].stored - kept * (layers[0].prompt + layers[0].seen) < 1


@ONE_FAMILY_EACH
def test_beams_and_copies_have_caches_of_their_own(case, which):
    model, inputs = case.model(), case.inputs(zoo.BATCH)
    handle = vlmprune.patch(model, EVERYWHERE[which])
    beams = generated(model, inputs, 4, num_beams=3, num_return_sequences=2).sequences[:, -4:]
    torch.manual_seed(5)
    options = {"do_sample": True, "top_k": 0, "num_return_sequences": 2}
    copies = generated(model, inputs, 4, **options).sequences[:, -4:]
    truth = cached_truth(case, inputs, model, handle)
    assert torch.equal(beams, truth.beams(4, 3)[0][:, :2].flatten(0, 1))
    assert torch.equal(copies, truth.sample(4, seed=5, copies=2))


@ONE_FAMILY_EACH
def test_a_cache_goes_back_to_where_nothing_had_left_it(case, which):
    """Behind the prompt, or behind the last entry that was evicted."""
    model, inputs = case.model(), case.inputs(zoo.SINGLE)
    handle = vlmprune.patch(model, EVERYWHERE[which])
    out = generated(model, inputs)
    tokens = out.sequences[0, -STEPS:].tolist()
    truth = cached_truth(case, inputs, model, handle)
    lengths = [truth.cached.lengths(0, tokens[:fed]) for fed in range(STEPS)]
    grown = [
        all(b == a + 1 for a, b in zip(*pair, strict=True)) for pair in itertools.pairwise(lengths)
    ]
    fed = max(n for n in range(1, STEPS) if grown[n - 1])  # so many that the last one evicts none
    cache = generated(model, inputs, fed + 1)[CACHE]
    refused = 0
    for back in range(1, fed + 1):
        past = copy.deepcopy(cache)
        if not all(grown[fed - back : fed]):
            refused += 1
            with pytest.raises(vlmprune.UnsupportedFeatureError, match="crop"):
                past.crop(-back)
            assert [layer.keys.shape[2] for layer in past.layers] == lengths[fed]
            continue
        past.crop(-back)
        assert [layer.keys.shape[2] for layer in past.layers] == lengths[fed - back]
        with torch.no_grad():
            logits = [
                model(input_ids=torch.tensor([[token]]), **{CACHE: past}).logits[0, -1]
                for token in (50, 7)
            ]
        expected = truth.cached.decode(0, [*tokens[: fed - back], 50, 7])
        torch.testing.assert_close(torch.stack(logits), expected[-2:], **TOLERANCE)
    evicts = EVERYWHERE[which][-1].name == "elastic_cache"
    assert 0 < refused < fed if evicts else not refused


@zoo.BOTH_FAMILIES
@LISTS
@pytest.mark.parametrize("rows", [zoo.SINGLE, (zoo.ONE, (2, 3, *zoo.ONE))], ids=["one", "padded"])
def test_a_text_that_was_cached_before_the_image(case, which, rows):
    """It is part of what new tokens attend to."""
    for positions in positions_of(case, which):
        inputs = case.inputs(rows)
        before = int((inputs["attention_mask"] == 0).sum(1).max()) + 4

        def turns(model, inputs=inputs, before=before):
            cache, mask = DynamicCache(config=model.config.text_config), inputs["attention_mask"]
            places = (mask.cumsum(1) - 1).clamp_min(0)
            given = {"input_ids": inputs["input_ids"][:, :before]}
            if not case.packed:
                given["position_ids"] = places[:, :before]
            with torch.no_grad():
                model(**given, attention_mask=mask[:, :before], **{CACHE: cache})
            return generated(model, inputs, **{CACHE: cache})

        try:
            plain = turns(case.reference())
        except Exception as error:
            skips.skip("fails unpatched", type(error).__name__)
        expected = logits_of(generated(case.reference(), inputs))
        if not torch.allclose(logits_of(plain), expected, atol=1e-3):
            skips.skip("differs unpatched")
        model = case.model()
        handle = vlmprune.patch(model, EVERYWHERE[which], positions=positions)
        out = turns(model)
        if which in ("elastic_cache", "all places"):
            # Whose attention is counted, and which entries it merges, begins with the image's turn.
            assert torch.isfinite(logits_of(out)).all()
            continue
        truth = cached_truth(case, inputs, model, handle)
        for row in range(len(rows)):
            tokens = out.sequences[row, -STEPS:].tolist()
            found = logits_of(out)[:, row]
            expected = truth.cached.decode(row, tokens[:-1])
            torch.testing.assert_close(found, expected, **TOLERANCE)


@METHODS
def test_a_new_image_on_the_same_cache_is_refused(name):
    model, inputs = CLIP.model(), CLIP.inputs(zoo.SINGLE)
    vlmprune.patch(model, call_of(name, keep_ratio=0.4))
    cache = generated(model, inputs, steps=2)[CACHE]
    before = [layer.keys.clone() for layer in cache.layers]
    with pytest.raises(vlmprune.UnsupportedFeatureError, match="new image"):
        model(**{k: v for k, v in inputs.items() if k != "attention_mask"}, **{CACHE: cache})
    assert all(torch.equal(a, b.keys) for a, b in zip(before, cache.layers, strict=True))

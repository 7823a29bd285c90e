"""Budgets and methods that change while a model serves: `handle.set`, `budget`, `disabled`."""

from __future__ import annotations

import itertools
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import vlmprune
from kit import skips, zoo
from kit.oracle import Truth
from kit.reported import cached_truth, truth_of
from kit.snapshots import differences, snapshot
from vlmprune.adapters.cache_names import CACHE
from vlmprune.prune.contract import Place

LLAVA = zoo.CASES["llava-clip-llama"]
STEPS = 4
DETAILS = {
    "max_new_tokens": STEPS,
    "do_sample": False,
    "return_dict_in_generate": True,
    "output_logits": True,
}
CLOSE = {"atol": 1e-4, "rtol": 1e-4}
SETTINGS = {
    "before": [vlmprune.method("divprune", keep_ratio=0.4)],
    "tower": [vlmprune.method("vtc_cls", keep_ratio=0.4)],
    "merging": [vlmprune.method("visionzip", keep_ratio=0.4)],
    "decoder": [vlmprune.method("fastv", keep_ratio=0.4, layer=2)],
    "steps": [vlmprune.method("transprune", keep_ratio=0.4)],
    "schedule": [vlmprune.method("pyramiddrop", keep_ratio=0.2)],
    "neurons": [vlmprune.method("corematching", keep_ratio=0.3)],
    "cache": [vlmprune.method("elastic_cache", keep_ratio=0.3, distance=-4)],
    "attending": [vlmprune.method("token_select", keep_ratio=0.3, **zoo.SMALL["token_select"])],
    "everywhere": [
        vlmprune.method("divprune", keep_ratio=0.5),
        vlmprune.method("corematching", keep_ratio=0.3),
        vlmprune.method("visual_press", keep_ratio=0.2, press="received"),
    ],
}
"""Methods that need different hooks."""
KNOBS = ["divprune", "fastv", "pyramiddrop", "visionzip", "elastic_cache", "token_select"]


def ask(model, case, rows=zoo.SINGLE, **options):
    return model.generate(**case.inputs(rows), **{**DETAILS, **options})


def go_on(model, first, inputs, word=5):
    """A second turn in text."""
    ids = torch.cat([first.sequences, torch.full((len(first.sequences), 2), word)], 1)
    mask = torch.cat([inputs["attention_mask"], torch.ones(len(ids), STEPS + 2).long()], 1)
    return model.generate(input_ids=ids, attention_mask=mask, **{CACHE: first[CACHE]}, **DETAILS)


def whole_positions(model, inputs):
    """Those of a prompt with all its images: text rows, then the three rotary axes."""
    index, _ = model.model.get_rope_index(
        **{k: v for k, v in inputs.items() if k != "pixel_values"}
    )
    text = (inputs["attention_mask"].cumsum(-1) - 1)[None]
    return torch.cat([text, index])


def same(one, two) -> bool:
    return torch.equal(one.sequences, two.sequences) and all(
        map(torch.equal, one.logits, two.logits)
    )


def patched(case, calls):
    model = case.model()
    vlmprune.patch(model, calls)
    return model


def budgeted(name, **budget):
    return vlmprune.method(name, **budget, **zoo.SMALL.get(name, {}))


# --- set ---------------------------------------------------------------------------------------


@zoo.BOTH_FAMILIES
@pytest.mark.parametrize("name", KNOBS)
def test_another_budget_is_as_if_patched_with_it(case, name):
    options = zoo.options_for(case, name)
    model = case.model()
    handle = vlmprune.patch(model, name, keep_ratio=0.6, **options, **zoo.SMALL.get(name, {}))
    for budget in ({"keep_ratio": 0.3}, {"keep_tokens": 20}):
        handle.set(**budget)
        alone = case.model()
        vlmprune.patch(alone, name, **budget, **options, **zoo.SMALL.get(name, {}))
        assert same(ask(model, case, zoo.BATCH), ask(alone, case, zoo.BATCH))
        assert str(handle.methods[0].budget) == "=".join(map(str, *budget.items()))


def test_every_method_after_every_other_is_as_if_patched_with_it():
    model, case = LLAVA.model(), LLAVA
    ask(model, case)  # transformers installs hooks of its own then
    before = snapshot(model)
    short = {"max_new_tokens": 2}
    expected = {name: ask(patched(case, calls), case, **short) for name, calls in SETTINGS.items()}
    handle = vlmprune.patch(model, SETTINGS["before"])
    order = [name for pair in itertools.permutations(SETTINGS, 2) for name in pair]
    for one, two in itertools.pairwise(order[::2] + order[1::2]):
        handle.set(SETTINGS[two])
        assert same(ask(model, case, **short), expected[two]), (one, two)
    handle.set("fastv", keep_ratio=0.4, layer=2)
    assert same(ask(model, case, **short), expected["decoder"])
    handle.remove()
    del expected  # whose caches hold what pruned them
    assert differences(before, snapshot(model)) == []


def test_a_patch_that_another_one_replaced_names_it():
    model = LLAVA.model()
    outer = vlmprune.patch(model, "divprune", keep_ratio=0.4)
    vlmprune.patch(model, "fastv", keep_tokens=9)
    with pytest.raises(
        vlmprune.UnsupportedModelError, match=r"fastv\(.*keep_tokens=9.* in its place"
    ):
        outer.set(keep_ratio=0.2)


def test_what_cannot_be_set_changes_nothing():
    model = LLAVA.model()
    handle = vlmprune.patch(model, "fastv", keep_ratio=0.4, layer=2)
    expected, before = ask(model, LLAVA), snapshot(model)
    for message, arguments, words in (
        ("keep_ratio=2", (), {"keep_ratio": 2}),
        ("cannot be reached", (), {"average_tokens": 1}),
        ("Two budgets", (), {"keep_ratio": 0.5, "keep_tokens": 3}),
        ("No budget", (), {}),
        ("images of one call", (), {"keep_tokens": [3, 4]}),
        ("layer is no budget.*with the method", (), {"layer": 3}),
        ("Unknown method", ("fastvv",), {}),
        ("needs a budget", ("divprune",), {}),
        ("0.3 is no method.*keep_ratio=0.25", (0.3,), {}),
        ("name it too", (), {"keep_ratio": 0.5, "positions": "original"}),
    ):
        with pytest.raises(vlmprune.VlmpruneError, match=message):
            handle.set(*arguments, **words)
    assert differences(before, snapshot(model)) == []
    assert same(ask(model, LLAVA), expected)
    handle.set(SETTINGS["everywhere"])
    with pytest.raises(vlmprune.BudgetError, match="3 methods"):
        handle.set(keep_ratio=0.5)
    with pytest.raises(vlmprune.BudgetError, match="3 methods"):
        handle.budget(keep_ratio=0.5)
    handle.remove()
    for change in (handle.set, handle.budget):
        with pytest.raises(vlmprune.UnsupportedModelError, match="not on the model"):
            change(keep_ratio=0.5)


class During:
    """A streamer that does something when the first new token is there."""

    def __init__(self, act):
        self.act, self.seen = act, 0

    def put(self, value):
        self.seen += 1
        if self.seen == 2:
            self.act()

    def end(self):
        pass


@zoo.BOTH_FAMILIES
@pytest.mark.parametrize("one", ["before", "schedule", "attending", "everywhere"])
@pytest.mark.parametrize("two", ["before", "attending"])
@pytest.mark.parametrize("options", [{}, {"use_cache": False}])
def test_a_generation_under_way_ends_as_it_began(case, one, two, options):
    if "use_cache" in options and one in ("cache", "attending", "everywhere"):
        skips.skip("no cache")
    model = patched(case, SETTINGS[one])
    handle = model._vlmprune_handle
    expected = ask(model, case, **options)
    streamer = During(lambda: handle.set(SETTINGS[two]))
    assert same(ask(model, case, streamer=streamer, **options), expected)
    assert same(ask(model, case), ask(patched(case, SETTINGS[two]), case))


@zoo.BOTH_FAMILIES
@pytest.mark.parametrize(
    ("one", "two"), list(zip(SETTINGS, itertools.cycle(["schedule", "attending"]), strict=False))
)
def test_a_chat_goes_on_with_what_pruned_its_cache(case, one, two):
    if case.packed and one in ("tower", "merging"):
        skips.skip("no signal", "the CLS token")
    model, alone = patched(case, SETTINGS[one]), patched(case, SETTINGS[one])
    inputs = case.inputs(zoo.BATCH)
    first, expected = ask(model, case, zoo.BATCH), ask(alone, case, zoo.BATCH)
    model._vlmprune_handle.set(SETTINGS[two])
    if not case.packed:  # whose rope_deltas would be those of the last call
        ask(model, case)
    for word in (5, 6):
        if word == 6:
            model._vlmprune_handle.set(SETTINGS["before"])
            inputs = {
                "attention_mask": torch.cat(
                    [inputs["attention_mask"], torch.ones(3, STEPS + 2).long()], 1
                )
            }
        first, expected = (
            go_on(m, x, inputs, word) for m, x in ((model, first), (alone, expected))
        )
        assert same(first, expected)


@zoo.FAMILIES
@pytest.mark.parametrize(
    ("one", "two"), [("decoder", "schedule"), ("schedule", "before"), ("schedule", "dense")]
)
def test_a_new_image_in_a_chat_is_pruned_by_what_is_set_now(case, one, two):
    model, inputs = case.model(), case.inputs(zoo.SINGLE)
    handle = vlmprune.patch(model, SETTINGS[one], positions="original")
    first = ask(model, case)
    earlier = handle.last
    follow_up = case.inputs(((4, "A", 3),))
    ids = torch.cat([first.sequences, follow_up["input_ids"]], 1)
    images = [zoo.encoder_inputs(x)["image"] for x in (inputs, follow_up)]
    together = zoo.joined(*images)
    whole = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **together}
    new = {**whole, **images[1]}
    if case.packed:
        whole["mm_token_type_ids"] = (ids == zoo.IMAGE).int()
        new["position_ids"] = whole_positions(model, whole)
    if two == "dense":
        with handle.disabled():
            out = model.generate(**new, **{CACHE: first[CACHE]}, **DETAILS)
        everything = [torch.arange(n) for n in case.counts(((4, "A", 3),))]
        later = []
    else:
        handle.set(SETTINGS[two], positions="original")
        out = model.generate(**new, **{CACHE: first[CACHE]}, **DETAILS)
        everything = [torch.arange(n) for n in handle.last.tokens_in]
        later = handle.last.stages
    stages = {stage.layer: stage for stage in (*earlier.stages, *later)}
    kept = {0: [torch.arange(n) for n in earlier.tokens_in], 1: everything}
    cuts = []
    for layer in sorted(stages):
        for turn, of_turn in enumerate((earlier.stages, later)):
            kept[turn] = next((s.kept for s in of_turn if s.layer == layer), kept[turn])
        cuts.append((layer, [*kept[0], *kept[1]]))
    truth = Truth(case.reference("eager"), whole, cuts, ["original"] * len(cuts))
    tokens, logits = truth.decode(STEPS)
    torch.testing.assert_close(torch.stack(out.logits), logits, **CLOSE)
    assert torch.equal(out.sequences[:, -STEPS:], tokens)


@pytest.mark.parametrize("one", ["before", "decoder"])
def test_chats_of_a_model_with_rope_deltas_pass_their_positions(one):
    """Another chat's call has left its own rope_deltas on the model."""
    case = zoo.CASES["qwen2_5_vl"]
    model, alone = patched(case, SETTINGS[one]), patched(case, SETTINGS[one])
    inputs = case.inputs(zoo.SINGLE)
    first, expected = ask(model, case), ask(alone, case)
    deltas = model.model.rope_deltas.clone()
    ask(model, case, ((4, "B", 3),))
    assert not torch.equal(model.model.rope_deltas, deltas)

    ids = torch.cat([first.sequences, torch.full((1, 2), 5)], 1)
    mask = torch.ones_like(ids)
    grid = zoo.encoder_inputs(inputs)["image"]["image_grid_thw"]
    index, _ = model.model.get_rope_index(
        ids,
        mm_token_type_ids=(ids == zoo.IMAGE).int(),
        image_grid_thw=grid,
        attention_mask=mask,
    )
    second = model.generate(
        input_ids=ids,
        attention_mask=mask,
        position_ids=torch.cat([(mask.cumsum(-1) - 1)[None], index]),
        **{CACHE: first[CACHE]},
        **DETAILS,
    )
    assert same(second, go_on(alone, expected, inputs))


def test_a_cache_method_takes_no_new_image_of_another_method():
    model = patched(LLAVA, SETTINGS["cache"])
    first = ask(model, LLAVA)
    model._vlmprune_handle.set(SETTINGS["before"])
    follow_up = LLAVA.inputs(((4, "A", 3),))
    ids = torch.cat([first.sequences, follow_up["input_ids"]], 1)
    new = {**follow_up, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with pytest.raises(vlmprune.UnsupportedFeatureError, match=r"elastic_cache.*new cache"):
        model.generate(**new, **{CACHE: first[CACHE]}, **DETAILS)


# --- threads -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KNOBS)
def test_requests_with_their_own_budgets_do_not_meet(name):
    model = LLAVA.model()
    handle = vlmprune.patch(model, budgeted(name, keep_ratio=0.5))
    requests = [
        ({word: value}, rows)
        for word, value in (("keep_tokens", 25), ("keep_tokens", 9), ("keep_ratio", 0.7))
        for rows in (zoo.SINGLE, (zoo.TWO,), zoo.BATCH, (zoo.NONE,))
    ]

    def run(request):
        budget, rows = request
        with handle.budget(**budget):
            out = ask(model, LLAVA, rows)
        return out, [kept.tolist() for kept in handle.last.kept]

    serial = [run(request) for request in requests]
    alone = patched(LLAVA, budgeted(name, keep_tokens=9))
    assert same(serial[4][0], ask(alone, LLAVA)) and not same(serial[4][0], serial[0][0])
    with ThreadPoolExecutor(4) as pool:
        threaded = list(pool.map(run, requests))
    for (out, kept), (expected, of_it) in zip(threaded, serial, strict=True):
        assert same(out, expected) and kept == of_it


def test_a_storm_of_settings_while_four_threads_generate():
    model = LLAVA.model()
    ask(model, LLAVA)  # transformers installs hooks of its own then
    before = snapshot(model)
    rows = (zoo.SINGLE, zoo.BATCH)
    expected = [
        {name: ask(patched(LLAVA, calls), LLAVA, row) for name, calls in SETTINGS.items()}
        for row in rows
    ]
    handle = vlmprune.patch(model, SETTINGS["before"])
    stop, found = threading.Event(), []

    def serve(number):
        row = number % 2
        while not stop.is_set():
            out = ask(model, LLAVA, rows[row])
            matches = [name for name, one in expected[row].items() if same(out, one)]
            assert matches, "an answer of no setting"
            found.extend(matches)

    with ThreadPoolExecutor(4) as pool:
        running = [pool.submit(serve, number) for number in range(4)]
        try:
            for name in itertools.islice(itertools.cycle(SETTINGS), 60):
                handle.set(SETTINGS[name])
                threading.Event().wait(0.01)
        finally:
            stop.set()
        for one in running:
            one.result()
    assert len(set(found)) > 2
    handle.remove()
    expected.clear()  # whose caches hold what pruned them
    assert differences(before, snapshot(model)) == []
    assert torch.equal(ask(model, LLAVA).sequences, ask(LLAVA.reference(), LLAVA).sequences)


# --- disabled ----------------------------------------------------------------------------------


@zoo.FAMILIES
@pytest.mark.parametrize("which", ["before", "everywhere"])
def test_disabled_is_dense_for_this_thread_alone(case, which):
    model = patched(case, SETTINGS[which])
    handle = model._vlmprune_handle
    expected, dense = ask(model, case, zoo.BATCH), ask(case.model(), case, zoo.BATCH)
    assert not same(expected, dense)
    with handle.disabled():
        with handle.disabled():
            assert same(ask(model, case, zoo.BATCH), dense)
        assert same(ask(model, case, zoo.BATCH), dense)
        assert handle.methods == () and not handle.last.kept and "disabled" in handle.last.note
        with torch.no_grad():
            logits = model(**case.inputs(zoo.BATCH)).logits
            assert torch.equal(logits, case.reference()(**case.inputs(zoo.BATCH)).logits)
        with ThreadPoolExecutor(1) as pool:
            assert same(pool.submit(ask, model, case, zoo.BATCH).result(), expected)
        ask(model, case, prefill_chunk_size=None, num_beams=2)
    assert same(ask(model, case, zoo.BATCH), expected)
    assert handle.last.kept


@zoo.BOTH_FAMILIES
@pytest.mark.parametrize("which", ["before", "schedule", "cache", "attending", "everywhere"])
def test_a_pruned_cache_goes_on_inside_disabled(case, which):
    model, alone = patched(case, SETTINGS[which]), patched(case, SETTINGS[which])
    inputs = case.inputs(zoo.BATCH)
    first, expected = ask(model, case, zoo.BATCH), ask(alone, case, zoo.BATCH)
    with model._vlmprune_handle.disabled():
        found = go_on(model, first, inputs)
    assert same(found, go_on(alone, expected, inputs))


def test_a_dense_cache_goes_on_outside_disabled():
    model, dense = patched(LLAVA, SETTINGS["schedule"]), LLAVA.model()
    inputs = LLAVA.inputs(zoo.BATCH)
    with model._vlmprune_handle.disabled():
        first = ask(model, LLAVA, zoo.BATCH)
    expected = go_on(dense, ask(dense, LLAVA, zoo.BATCH), inputs)
    assert same(go_on(model, first, inputs), expected)


def test_the_innermost_wish_holds_and_ends_with_an_exception():
    model = patched(LLAVA, SETTINGS["before"])
    handle = model._vlmprune_handle
    expected = ask(model, LLAVA)
    with pytest.raises(ZeroDivisionError), handle.budget(keep_tokens=5):
        with handle.disabled(), handle.budget(keep_tokens=7):
            ask(model, LLAVA)
            assert handle.last.tokens_kept == [7]
        ask(model, LLAVA)
        assert handle.last.tokens_kept == [5]
        raise ZeroDivisionError
    assert same(ask(model, LLAVA), expected)


# --- a budget per image ------------------------------------------------------------------------


@zoo.turns("name", KNOBS, [zoo.CASES[name] for name in zoo.FAMILY_NAMES])
def test_every_image_may_have_a_budget(case, name):
    if (options := zoo.options_for(case, name)) is None:
        skips.skip("no signal", name)
    model = case.model()
    handle = vlmprune.patch(model, name, keep_ratio=0.5, **options, **zoo.SMALL.get(name, {}))
    with handle.budget(keep_tokens=[6, None, 10]):
        inputs = case.inputs(zoo.BATCH)
        out = ask(model, case, zoo.BATCH)
        on_cache = handle.methods[0].method.place is Place.CACHE
        if not on_cache:
            assert handle.last.tokens_kept == [6, case.counts(zoo.BATCH)[1], 10]
        if name == "token_select":
            return
        if on_cache:
            truth = cached_truth(case, inputs, model, handle)
        else:
            truth = truth_of(case, inputs, model, handle)
        tokens, logits = truth.decode(STEPS)
    torch.testing.assert_close(torch.stack(out.logits), logits, **CLOSE)
    assert torch.equal(out.sequences[:, -STEPS:], tokens)


@pytest.mark.parametrize(
    "options", [{"num_beams": 2}, {"num_return_sequences": 2, "do_sample": True}]
)
def test_beams_share_the_budgets_of_their_images(options):
    model = LLAVA.model()
    handle = vlmprune.patch(model, "fastv", keep_ratio=0.5)
    with handle.budget(keep_ratio=[0.25, 1.0, 0.5]):
        ask(model, LLAVA, zoo.BATCH, **options)
    assert handle.last.tokens_kept == [9, 36, 18]


@pytest.mark.parametrize("budgets", [torch.tensor([5, 9]), np.array([5, 9]), (5, 9)])
def test_budgets_of_images_may_be_an_array(budgets):
    model = patched(LLAVA, SETTINGS["before"])
    handle = model._vlmprune_handle
    with handle.budget(keep_tokens=budgets):
        ask(model, LLAVA, ((7, "C", 2, "C", 3),))
    assert handle.last.tokens_kept == [5, 9]


@pytest.mark.parametrize("name", ["divprune", "fastv", "elastic_cache"])
@pytest.mark.parametrize("tokens", [[5, 6], [5, 6, 7, 8]])
def test_another_number_of_budgets_is_refused_by_the_call(name, tokens):
    model = LLAVA.model()
    handle = vlmprune.patch(model, name, keep_ratio=0.5)
    expected = ask(model, LLAVA, zoo.BATCH)
    with (
        handle.budget(keep_tokens=tokens),
        pytest.raises(vlmprune.BudgetError, match=rf"{len(tokens)} images.*3"),
    ):
        ask(model, LLAVA, zoo.BATCH)
    assert same(ask(model, LLAVA, zoo.BATCH), expected)


def test_budgets_of_a_request_are_checked_where_they_are_given():
    handle = vlmprune.patch(LLAVA.model(), "fastv", keep_ratio=0.5)
    for message, words in (
        ("keep_tokens=0", {"keep_tokens": 0}),
        ("keep_ratio=1.5", {"keep_ratio": [0.5, 1.5]}),
        ("no image", {"keep_tokens": []}),
        ("cannot be reached", {"average_tokens": [30, 1]}),
        ("Two budgets", {"keep_ratio": 0.5, "keep_tokens": 3}),
        ("layer is no budget", {"layer": 3}),
    ):
        with pytest.raises(vlmprune.VlmpruneError, match=message):
            handle.budget(**words)
    on_cache = vlmprune.patch(LLAVA.model(), "elastic_cache", keep_ratio=0.5)
    with pytest.raises(vlmprune.BudgetError, match="every layer of the prefill"):
        on_cache.budget(average_tokens=3)


def test_images_and_videos_have_budgets_in_this_order():
    case = zoo.CASES["llava_onevision"]
    model = case.model()
    handle = vlmprune.patch(model, "divprune", keep_ratio=0.5)
    rows = ((2, "V", 3, "A", 1),)
    with handle.budget(keep_tokens=[11, 22]):
        ask(model, case, rows)
    assert handle.last.tokens_kept == [22, 11]  # as they lie in the prompt


# --- remembered images -------------------------------------------------------------------------


def test_an_image_is_remembered_with_its_budget():
    model = LLAVA.model()
    handle = vlmprune.patch(model, "divprune", keep_ratio=0.5, remember_images=9)
    for budget in (5, 20, 5, 20):
        with handle.budget(keep_tokens=budget):
            out = ask(model, LLAVA)
            assert handle.last.tokens_kept == [budget]
        assert same(out, ask(patched(LLAVA, budgeted("divprune", keep_tokens=budget)), LLAVA))
    assert handle.remembered.misses == 2 and handle.remembered.hits == 2
    with handle.budget(keep_tokens=[7, 5, 20]):
        ask(model, LLAVA, ((3, "A", 2, "C", 5), (2, "C", 3)))
        assert handle.last.tokens_kept == [7, 5, 20]
    assert handle.remembered.misses == 3 and handle.remembered.hits == 4
    handle.set("grid", keep_tokens=5)
    ask(model, LLAVA)
    assert handle.remembered.misses == 4
    with handle.disabled():
        assert same(ask(model, LLAVA), ask(LLAVA.model(), LLAVA))
    with pytest.raises(vlmprune.UnsupportedFeatureError, match="catp"):
        handle.set("catp", keep_tokens=5)

"""Budgets become exact counts, or errors that say what to type."""

import re
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vlmprune.prune.budget import (
    BUDGET_WORDS,
    Budget,
    MethodCall,
    idle,
    layer_flops,
    plan,
    remark,
    round_tokens,
    tokens_per_layer,
)
from vlmprune.prune.contract import Cut, Decoder, InDecoder, ModelShape, Place, Tower
from vlmprune.prune.errors import BudgetError, MethodFieldError
from vlmprune.prune.registry import method, method_class, method_names

TOWER = Tower(num_layers=24, has_cls=True)


def model(num_layers: int, hidden_size: int = 4096, intermediate_size: int = 11008) -> ModelShape:
    decoder = Decoder(
        num_layers=num_layers, hidden_size=hidden_size, intermediate_size=intermediate_size
    )
    return ModelShape(tower=TOWER, decoder=decoder)


LLAMA_7B, LLAMA_13B = model(32), model(40, 5120, 13824)

sizes = st.integers(1, 3000)
ratios = st.floats(0, 1, exclude_min=True)


def keeps(num_tokens: int, calls, shape: ModelShape = LLAMA_7B) -> list[int]:
    calls = calls if isinstance(calls, list) else [calls]
    return [stage.keep for stage in plan(num_tokens, calls, shape)]


# --- What is said --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"keep_tokens": 577}, r"divprune\(keep_tokens=577\) is above an image's 576 tokens: all"),
        ({"average_tokens": 1000}, r"average_tokens=1000\) is above an image's 576 tokens"),
        ({"average_tokens": 0.5}, r"average_tokens=0\.5\) is below 1.*shares are keep_ratio"),
        ({"keep_tokens": 576}, None),
        ({"average_tokens": 576}, None),
        ({"average_tokens": 1}, None),
        ({"keep_ratio": 0.001}, None),
        ({"flops_ratio": 0.5}, None),
    ],
)
def test_counts_that_an_image_cannot_have(words, said):
    found = remark(method("divprune", **words), 576)
    assert found is None if said is None else re.search(said, found)


@pytest.mark.parametrize(
    ("first", "second", "said"),
    [
        ({"keep_ratio": 0.25}, {"keep_ratio": 0.25}, True),
        ({"keep_ratio": 0.25}, {"keep_ratio": 0.5}, True),
        ({"keep_tokens": 64}, {"keep_tokens": 64}, True),
        ({"average_tokens": 64}, {"average_tokens": 64}, True),
        ({"keep_ratio": 0.25}, {"keep_ratio": 0.24}, False),
        ({"keep_ratio": 0.25}, {"keep_tokens": 64}, False),
    ],
)
def test_a_method_that_has_nothing_to_do(first, second, said):
    calls = [method("divprune", **first), method("fastv", **second)]
    found = list(idle(calls))
    assert len(found) == said
    if said:
        assert str(calls[1]) in found[0] and f"behind {calls[0]}" in found[0]
        assert keeps(576, calls) == keeps(576, calls[0])


def test_a_published_schedule_has_no_budget_to_compare():
    assert not list(idle([method("divprune", keep_ratio=0.1), method("pyramiddrop")]))


# --- Counts ----------------------------------------------------------------------------------


@given(sizes, ratios)
def test_ratio_is_the_rounded_count_for_every_image(num_tokens, ratio):
    count = round_tokens(ratio, num_tokens)
    assert 1 <= count <= num_tokens
    assert abs(count - ratio * num_tokens) <= 0.5 or count == 1
    # a count that drops nothing is no cut at all
    expected = [count] if count < num_tokens else []
    assert keeps(num_tokens, method("divprune", keep_ratio=ratio)) == expected
    assert keeps(num_tokens, method("fastv", keep_ratio=ratio)) == expected


@pytest.mark.parametrize(
    ("ratio", "num_tokens", "count"),
    [
        (0.5, 1, 1),  # at least one
        (0.999, 1, 1),
        (0.999, 577, 576),
        (0.999, 100, 100),  # 99.9 rounds to all
        (0.5, 577, 288),  # 288.5, half to even
        (0.5, 575, 288),  # 287.5, half to even
        (0.25, 10, 2),  # 2.5, half to even
        (0.1111, 576, 64),
        (1.0, 576, 576),
        (1e-9, 2880, 1),
    ],
)
def test_rounding(ratio, num_tokens, count):
    assert round_tokens(ratio, num_tokens) == count


@given(st.lists(sizes, min_size=1, max_size=6), st.integers(1, 3000))
def test_keep_tokens_holds_per_image_and_never_grows_one(images, keep):
    call = method("fastv", keep_tokens=keep)
    for num_tokens in images:
        assert keeps(num_tokens, call) == ([keep] if keep < num_tokens else [])


@given(st.integers(2, 3000), st.sampled_from(["keep_ratio", "flops_ratio"]))
def test_full_budget_does_nothing(num_tokens, word):
    assert keeps(num_tokens, method("fastv", **{word: 1})) == []
    assert keeps(num_tokens, method("divprune", **{word: 1})) == []


# --- Solved budgets --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "layer", "counts"),
    [
        (LLAMA_7B, 2, (166.4, 98.1, 29.9)),
        (LLAMA_7B, 3, (152.3, 81.7, 11.0)),
        (LLAMA_13B, 2, (171.8, 104.4, 37.1)),
        (LLAMA_13B, 3, (160.9, 91.7, 22.5)),
    ],
)
def test_average_tokens_gives_the_counts_of_the_literature(shape, layer, counts):
    for average, count in zip((192, 128, 64), counts, strict=True):
        (kept,) = keeps(576, method("fastv", layer=layer, average_tokens=average), shape)
        assert abs(kept - count) <= 0.55  # the table prints one decimal


def test_average_tokens_of_a_long_image():
    for average, count in ((640, 490.7), (320, 149.3)):
        (kept,) = keeps(2880, method("fastv", average_tokens=average))
        assert abs(kept - count) <= 0.55


def test_an_average_out_of_reach_names_the_nearest():
    with pytest.raises(BudgetError, match=r"fastv.*average_tokens=160.*nearest") as caught:
        keeps(2880, method("fastv", average_tokens=160))
    nearest = re.search(r"nearest that can is average_tokens=([\d.]+);", str(caught.value))
    assert float(nearest[1]) == pytest.approx((2 * 2880 + 30) / 32, rel=1e-5)
    assert keeps(2880, method("fastv", average_tokens=float(nearest[1]))) == [1]


@given(st.integers(2, 3000), st.integers(1, 31), st.floats(0.01, 1), st.booleans())
def test_solved_budgets_are_the_nearest_count(num_tokens, layer, value, flops):
    """Neither one token more nor one less is nearer; or the refusal is right."""
    word, value = ("flops_ratio", value) if flops else ("average_tokens", value * num_tokens)

    def cost(keep):
        entering = [num_tokens] * layer + [keep] * (32 - layer)
        if not flops:
            return sum(entering) / 32
        spent = sum(layer_flops(n, LLAMA_7B.decoder) for n in entering)
        return spent / (32 * layer_flops(num_tokens, LLAMA_7B.decoder))

    call = method("fastv", layer=layer, **{word: value})
    if value < cost(1) - (cost(2) - cost(1)) / 2:
        with pytest.raises(BudgetError, match=f"nearest that can is {word}="):
            keeps(num_tokens, call)
        return
    kept = (keeps(num_tokens, call) or [num_tokens])[0]
    away = abs(cost(kept) - value)
    for other in (kept - 1, kept + 1):
        if 1 <= other <= num_tokens:
            assert away <= abs(cost(other) - value) + 1e-9


def test_flops_ratio_before_the_llm():
    """All layers see the same count: the published share for 128 of 576 tokens gives 128 back."""
    share = layer_flops(128, LLAMA_7B.decoder) / layer_flops(576, LLAMA_7B.decoder)
    assert keeps(576, method("divprune", flops_ratio=share)) == [128]


@pytest.mark.parametrize(
    ("num_tokens", "ratio", "published"),
    [(576, 1.0, 3.82), (2880, 1.0, 20.83), (576, 0.5, 2.01), (576, 0.25, 1.12)],
)
def test_flops_are_the_published_ones(num_tokens, ratio, published):
    stages = plan(num_tokens, [method("fastv", keep_ratio=ratio)], LLAMA_7B)
    entering = tokens_per_layer(num_tokens, stages, 32)
    flops = sum(layer_flops(n, LLAMA_7B.decoder) for n in entering)
    assert flops / 1e12 == pytest.approx(published, abs=0.0051)


# --- Compositions and schedules --------------------------------------------------------------


@given(st.integers(1, 1500), st.integers(1, 1500), st.integers(1, 1500), st.integers(1, 31))
def test_a_list_of_methods_cuts_in_turn(num_tokens, first, second, layer):
    calls = [
        method("divprune", keep_tokens=first),
        method("fastv", keep_tokens=second, layer=layer),
    ]
    stages = plan(num_tokens, calls, LLAMA_7B)
    after_first = min(num_tokens, first)
    after_second = min(after_first, second)
    expected = [after_first] * layer + [after_second] * (32 - layer)
    assert tokens_per_layer(num_tokens, stages, 32) == expected
    counts = [num_tokens, *(stage.keep for stage in stages)]
    assert all(after < before for before, after in pairwise(counts))
    assert [stage.call for stage in stages] == [
        call
        for call, (before, after) in zip(
            calls, pairwise((num_tokens, after_first, after_second)), strict=True
        )
        if after < before
    ]


def test_ratios_in_a_list_count_from_the_whole_image():
    calls = [method("divprune", keep_ratio=0.5), method("fastv", keep_ratio=0.25)]
    assert keeps(576, calls) == [288, 144]


def test_average_in_a_list_counts_the_earlier_cut():
    calls = [method("divprune", keep_tokens=200), method("fastv", average_tokens=100)]
    stages = plan(576, calls, LLAMA_7B)
    assert sum(tokens_per_layer(576, stages, 32)) / 32 == pytest.approx(100, abs=0.5)


class Staircase(InDecoder):
    """Three cuts that halve: 4, 2 and 1 times the last count."""

    name = "staircase"

    def needs(self, shape):
        return ()

    def cuts(self, shape):
        return (Cut(Place.DECODER, 8, 4.0), Cut(Place.DECODER, 16, 2.0), Cut(Place.DECODER, 24))

    def select(self, tokens, keep):
        raise NotImplementedError


@given(st.integers(1, 3000), st.integers(1, 3000))
def test_a_schedule_keeps_its_proportions(num_tokens, keep):
    call = MethodCall(Staircase(), Budget("keep_tokens", keep))
    entering = tokens_per_layer(num_tokens, plan(num_tokens, [call], LLAMA_7B), 32)
    keep = min(keep, num_tokens)
    parts = [num_tokens, min(num_tokens, 4 * keep), min(num_tokens, 2 * keep), keep]
    assert entering == [count for count in parts for _ in range(8)]


# --- What is typed ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("0.25", Budget("keep_ratio", 0.25)),
        ("1.0", Budget("keep_ratio", 1.0)),
        (".5", Budget("keep_ratio", 0.5)),
        ("64", Budget("keep_tokens", 64)),
        ("1", Budget("keep_tokens", 1)),
        ("avg:64", Budget("average_tokens", 64)),
        ("avg:29.9", Budget("average_tokens", 29.9)),
        ("flops:0.3", Budget("flops_ratio", 0.3)),
    ],
)
def test_parse(text, budget):
    assert Budget.parse(text) == budget


@pytest.mark.parametrize("text", ["", "half", "avg:", "avg:x", "tokens:64", "25%", ":", "²"])
def test_parse_refuses_what_it_cannot_read(text):
    with pytest.raises(BudgetError, match=r"0\.25 .*64 .*avg:64 .*flops:0\.3"):
        Budget.parse(text)


@pytest.mark.parametrize("text", ["0", "-3", "0.0", "1.5", "-.2", "nan", "inf", "flops:2", "avg:0"])
def test_parse_refuses_what_is_out_of_range(text):
    with pytest.raises(BudgetError, match="give "):
        Budget.parse(text)


@given(st.sampled_from(BUDGET_WORDS), st.integers(1, 5000), st.floats(0.001, 1))
def test_a_printed_budget_has_word_and_value(word, count, share):
    value = share if word.endswith("ratio") else count
    text = str(Budget(word, value))
    assert text.startswith(f"{word}=")
    assert float(text.partition("=")[2]) == pytest.approx(value, rel=1e-5)


@pytest.mark.parametrize(
    ("word", "value", "hint"),
    [
        ("keep_ratio", 0, "0 < keep_ratio <= 1"),
        ("keep_ratio", 64, "keep_tokens"),
        ("keep_ratio", float("nan"), "0 < keep_ratio <= 1"),
        ("keep_ratio", "0.5", "0 < keep_ratio <= 1"),
        ("keep_ratio", True, "0 < keep_ratio <= 1"),
        ("keep_tokens", 0, "at least 1"),
        ("keep_tokens", 0.25, "keep_ratio"),
        ("average_tokens", 0, "above 0"),
        ("average_tokens", float("inf"), "above 0"),
        ("flops_ratio", 1.01, "0 < flops_ratio <= 1"),
    ],
)
def test_a_wrong_value_names_the_right_ones(word, value, hint):
    with pytest.raises(BudgetError, match=re.escape(hint)) as caught:
        method("divprune", **{word: value})
    assert f"{word}={value!r}" in str(caught.value)


@pytest.mark.parametrize("name", method_names())
def test_no_budget_and_two_budgets(name):
    with pytest.raises(BudgetError, match=r"exactly one of keep_ratio, keep_tokens"):
        method(name, keep_ratio=0.5, keep_tokens=3)
    if method_class(name).needs_budget:
        with pytest.raises(BudgetError, match=r"needs a budget.*keep_ratio=0\.25.*keep_tokens=64"):
            method(name)
    else:
        own = {"tome": {"r": 8}}.get(name, {})  # the one with a number that nobody published
        assert method(name, **own).budget is None


def test_budget_errors_are_value_errors():
    assert issubclass(BudgetError, ValueError)
    assert issubclass(MethodFieldError, TypeError)

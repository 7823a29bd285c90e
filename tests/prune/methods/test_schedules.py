"""What schedules of cuts in the decoder hold: published counts, budgets, layers on other depths."""

import math
import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kit.decoder import TILED, at_cut, average, entering, layers_of, model, stages
from torch._subclasses.fake_tensor import FakeTensorMode
from vlmprune.prune.budget import layer_flops, plan
from vlmprune.prune.contract import TextAttention
from vlmprune.prune.errors import BudgetError, MethodFieldError, UnsupportedModelError
from vlmprune.prune.methods.decoder.transprune import transition
from vlmprune.prune.registry import method, method_class
from vlmprune.prune.select import select
from vlmprune.prune.tiling import Tiling

HIGH, LOW = ("transprune", {}), ("transprune", {"schedule": "low"})
TTV = ("transprune", {"scores": "ttv"})
TWO_CUTS = ("transprune", {"layers": (5, 16), "ratios": (0.5, 0.1)})
PYRAMID = ("pyramiddrop", {})
CALLS = [PYRAMID, ("pyramiddrop", {"layers": (3,), "ratios": (0.3,)}), HIGH, LOW, TTV]
IDS = [f"{name}-{'-'.join(map(str, fields.values()))}" for name, fields in CALLS]


def teraflops(call, num_tokens: int) -> float:
    return sum(layer_flops(n, model().decoder) for n in entering(call, num_tokens)) / 1e12


def some_signals(method, cut: int, num_tokens: int, *, depth: int = 32, seed=0, constant=False):
    """What the method declares of the layers that ran before the cut, and of the cut ahead."""
    generator = torch.Generator().manual_seed(seed)
    signals = {}
    for signal in method.needs(model(depth)):
        if signal.layer < cut or (signal.layer == cut and isinstance(signal, TextAttention)):
            values = torch.rand(num_tokens, generator=generator)
            signals[signal] = torch.ones(num_tokens) if constant else values
    return signals


@pytest.mark.parametrize(("name", "fields"), CALLS, ids=IDS)
def test_equal_methods_declare_equal_signals(name, fields):
    one, two = (method_class(name)(**fields) for _ in range(2))
    assert one == two and hash(one) == hash(two) and one.needs(model()) == two.needs(model())


@pytest.mark.parametrize("name", ["pyramiddrop", "transprune"])
def test_facts(name):
    cls = method_class(name)
    assert cls.positions == "repacked" and not cls.needs_budget and not cls.finds_count


@pytest.mark.parametrize(
    ("call", "num_tokens", "published"),
    [
        (PYRAMID, 576, [(8, 288), (16, 144), (24, 72)]),
        (PYRAMID, 2880, [(8, 1440), (16, 720), (24, 360)]),
        (PYRAMID, 577, [(8, 288), (16, 144), (24, 72)]),
        (PYRAMID, 4, [(16, 2), (24, 1)]),  # four of four: the first cut is none
        (PYRAMID, 1, []),
        (HIGH, 576, [(7, 504), (9, 360), (12, 72)]),
        (HIGH, 2880, [(7, 2520), (9, 1800), (12, 360)]),
        (HIGH, 577, [(7, 504), (9, 360), (12, 72)]),
        (HIGH, 1, []),
        (LOW, 576, [(7, 360), (9, 108), (12, 36)]),
        (LOW, 2880, [(7, 1800), (9, 540), (12, 180)]),
        (LOW, 9, [(9, 3), (12, 1)]),
        (TWO_CUTS, 580, [(5, 290), (16, 58)]),
    ],
)
def test_published_counts(call, num_tokens, published):
    name, fields = call
    assert stages(method(name, **fields), num_tokens) == published


@pytest.mark.parametrize(
    ("call", "ratios"),
    [
        (PYRAMID, (0.5, 0.25, 0.125)),
        (HIGH, (0.875, 0.625, 0.125)),
        (LOW, (0.625, 0.1875, 0.0625)),
        (TWO_CUTS, (0.5, 0.1)),
        (("pyramiddrop", {"layers": (4, 9), "ratios": (0.7, 0.3)}), (0.7, 0.3)),
    ],
)
@given(num_tokens=st.integers(8, 4000))
def test_without_a_budget_the_ratios_hold(call, ratios, num_tokens):
    """The last count is rounded; those before are as far off as its rounding, times their share."""
    name, fields = call
    found = [keep for _, keep in stages(method(name, **fields), num_tokens)][-len(ratios) :]
    assert abs(found[-1] - ratios[-1] * num_tokens) <= 0.5
    for keep, ratio in zip(reversed(found), reversed(ratios), strict=False):
        off = 0.5 * ratio / ratios[-1] + 0.5
        assert abs(keep - ratio * num_tokens) <= off
    assert found == sorted(set(found), reverse=True)


def test_published_averages():
    assert average(method("pyramiddrop"), 576) == 270
    assert average(method("pyramiddrop"), 2880) == 1350
    assert average(method("transprune"), 576) == (7 * 576 + 2 * 504 + 3 * 360 + 20 * 72) / 32
    thirteen = (8 * 576 + 8 * 288 + 8 * 144 + 16 * 72) / 40
    assert average(method("pyramiddrop"), 576, depth=40) == thirteen


@pytest.mark.parametrize(
    ("call", "num_tokens", "published"),
    [
        (PYRAMID, 576, 1.78),
        (("pyramiddrop", {"layers": (10, 20)}), 576, 2.13),  # three stages of the second version
        (HIGH, 576, 1.56),
        (HIGH, 2880, 8.33),
        (LOW, 576, 1.19),
        (LOW, 2880, 6.41),
    ],
)
def test_published_flops(call, num_tokens, published):
    name, fields = call
    assert round(teraflops(method(name, **fields), num_tokens), 2) == published


@pytest.mark.parametrize(
    ("call", "shares"),
    [(PYRAMID, (4, 2, 1)), (HIGH, (7, 5, 1)), (LOW, (10, 3, 1)), (TWO_CUTS, (5, 1))],
    ids=["pyramiddrop", "high", "low", "two cuts"],
)
@given(num_tokens=st.integers(2, 3000), keep=st.integers(1, 3000))
def test_a_budget_keeps_the_proportions(call, shares, num_tokens, keep):
    name, fields = call
    found = entering(method(name, **fields, keep_tokens=keep), num_tokens)
    if keep >= num_tokens:
        assert found == [num_tokens] * 32
        return
    at = [cut.layer for cut in method_class(name)(**fields).cuts(model())]
    assert [found[layer] for layer in at] == [min(num_tokens, s * keep) for s in shares]
    assert found[: at[0]] == [num_tokens] * at[0] and found[-1] == keep


def test_keep_ratio_is_what_stays_in_the_end():
    assert stages(method("pyramiddrop", keep_ratio=1 / 9), 576) == [(8, 256), (16, 128), (24, 64)]
    # 7 and 5 times 144 tokens are more than there are: the earlier cuts are none
    assert stages(method("transprune", keep_ratio=0.25), 576) == [(12, 144)]


@pytest.mark.parametrize("name", ["pyramiddrop", "transprune"])
@pytest.mark.parametrize(
    ("word", "value"), [("average_tokens", 192), ("flops_ratio", 0.4), ("flops_ratio", 0.9)]
)
def test_solved_budgets_are_the_nearest(name, word, value):
    """Neither one token more nor one less in the end comes nearer."""

    def cost(keep):
        call = method(name, keep_tokens=keep)
        if word == "average_tokens":
            return average(call, 576)
        return teraflops(call, 576) / (32 * layer_flops(576, model().decoder) / 1e12)

    keep = stages(method(name, **{word: value}), 576)[-1][1]
    away = [abs(cost(k) - value) for k in (keep - 1, keep, keep + 1)]
    assert min(away) == away[1]


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("pyramiddrop", (8 * 576 + 8 * (4 + 2 + 1)) / 32),
        ("transprune", (7 * 576 + 2 * 7 + 3 * 5 + 20) / 32),
    ],
)
def test_an_average_out_of_reach_names_the_nearest(name, nearest):
    with pytest.raises(BudgetError, match=rf"{name}.*average_tokens=64.*cut earlier") as caught:
        plan(576, [method(name, average_tokens=64)], model())
    told = float(re.search(r"nearest that can is average_tokens=([\d.]+);", str(caught.value))[1])
    assert told == pytest.approx(nearest, rel=1e-5)
    assert stages(method(name, average_tokens=told), 576)[-1][1] == 1


@pytest.mark.parametrize(
    ("depth", "pyramid", "trans"),
    [
        (4, [1, 2, 3], [1, 2, 3]),
        (6, [2, 3, 4], [1, 2, 3]),  # 1.5, 3, 4.5 and 1.3, 1.7, 2.2
        (28, [7, 14, 21], [6, 8, 10]),
        (32, [8, 16, 24], [7, 9, 12]),
        (40, [8, 16, 24], [9, 11, 15]),  # 40 is published for PyramidDrop, unchanged
        (64, [16, 32, 48], [14, 18, 24]),
    ],
)
def test_layers_scale(depth, pyramid, trans):
    assert layers_of("pyramiddrop", depth) == pyramid
    assert layers_of("transprune", depth) == trans
    steps = method_class("transprune")(scores="ttv").needs(model(depth))
    assert {s.layer for s in steps} == set(range(trans[0] - 1, trans[-1]))


def test_user_layers_hold_on_any_depth():
    assert layers_of("pyramiddrop", 28, layers=(3, -4), ratios=(0.5, 0.1)) == [3, 24]
    assert layers_of("transprune", 28, layers=(1, 2, -1)) == [1, 2, 27]
    steps = method_class("transprune")(layers=(1, 2, 4), scores="ttv").needs(model(28))
    assert {s.layer for s in steps} == {0, 1, 2, 3}


@pytest.mark.parametrize("name", ["pyramiddrop", "transprune"])
def test_too_shallow_a_decoder_is_refused(name):
    with pytest.raises(UnsupportedModelError, match=r"3 cuts.*has 3.*fastv"):
        method_class(name)().cuts(model(3))


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("pyramiddrop", {"layers": ()}, r"layers=\(\).*tuple of layer numbers"),
        ("pyramiddrop", {"layers": [8, 16, 24]}, r"layers=\[8, 16, 24\].*\(8, 16, 24\)"),
        ("pyramiddrop", {"layers": 8}, r"layers=8 .*tuple"),
        ("pyramiddrop", {"layers": (8, 16.0)}, "tuple of layer numbers"),
        ("pyramiddrop", {"layers": (True, 16)}, "tuple of layer numbers"),
        ("pyramiddrop", {"ratios": 0.5}, r"ratios=0\.5 .*tuple of shares"),
        ("pyramiddrop", {"ratios": (0.5, 0.5, 0.1)}, "falling from cut to cut"),
        ("pyramiddrop", {"ratios": (1.0, 0.5, 0.1)}, "between 0 and 1"),
        ("pyramiddrop", {"ratios": (0.5, 0.25, 0)}, "between 0 and 1"),
        ("pyramiddrop", {"ratios": (0.5, math.nan, 0.1)}, "nan"),
        ("pyramiddrop", {"ratios": ("a", "b", "c")}, "tuple of shares"),
        ("pyramiddrop", {"ratios": (0.5, 0.25)}, "3 cuts at layers.*one ratio for each"),
        ("pyramiddrop", {"layers": (4,), "ratios": (0.5, 0.25)}, "the 1 cuts at layers"),
        ("transprune", {"layers": (7, 9)}, r"layers=\(7, 9\).*3 cuts.*one ratio for each layer"),
        ("transprune", {"ratios": (0.5, 0.1)}, r"layers=\(7, 9, 12\).*2 cuts of ratios=\(0\.5"),
        ("transprune", {"ratios": (0.1, 0.5, 0.6)}, r"ratios=.*falling from cut to cut"),
        (
            "transprune",
            {"ratios": (0.5, 0.2, 0.1), "schedule": "low"},
            r"schedule='low' and ratios=.*one of them",
        ),
        ("transprune", {"layers": "789"}, "tuple of layer numbers"),
        ("transprune", {"schedule": "mid"}, "schedule='mid'.*'high' or 'low'"),
        ("transprune", {"scores": "attention"}, "scores='attention'.*'both' or 'ttv'"),
    ],
)
def test_fields_are_checked(name, fields, message):
    with pytest.raises(MethodFieldError, match=message):
        method(name, **fields)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ((0, 8, 16), r"layers 0, 8, 16 .* in 1\.\.31"),
        ((8, 8, 16), "ascending"),
        ((16, 8, 24), "ascending"),
        ((8, -1, -2), "layers 8, 31, 30 of this model, which has 32"),
        ((8, 16, 32), r"layers=32 is not a layer.*has 32.*0\.\.31"),
        ((-33, 16, 24), "layers=-33 is not a layer"),
    ],
)
@pytest.mark.parametrize("name", ["pyramiddrop", "transprune"])
def test_layers_are_checked_against_the_model(name, layers, message):
    with pytest.raises(MethodFieldError, match=message):
        method_class(name)(layers=layers).cuts(model())


@pytest.mark.parametrize("depth", [4, 32])
@pytest.mark.parametrize("tiling", [Tiling.single(3, 5), TILED], ids=["plain", "tiled"])
@pytest.mark.parametrize(("name", "fields"), CALLS, ids=IDS)
def test_every_count_at_every_cut(name, fields, tiling, depth):
    """Exactly as many as asked, ascending and unique; newlines are tokens like all others."""
    chosen = method_class(name)(**fields)
    for cut in chosen.cuts(model(depth)):
        signals = some_signals(chosen, cut.layer, tiling.num_tokens, depth=depth)
        before = {signal: tensor.clone() for signal, tensor in signals.items()}
        tokens = at_cut(signals, layer=cut.layer, depth=depth, tiling=tiling)
        for keep in range(1, tiling.num_tokens + 1):
            kept = select(chosen, tokens, keep).kept
            assert len(kept) == keep and kept.dtype == torch.int64
            assert kept[0] >= 0 and kept[-1] < tiling.num_tokens and (kept.diff() > 0).all()
        assert all(torch.equal(before[signal], tensor) for signal, tensor in signals.items())


@pytest.mark.parametrize(("name", "fields"), CALLS, ids=IDS)
def test_ties_go_to_the_lower_index(name, fields):
    chosen = method_class(name)(**fields)
    for cut in chosen.cuts(model()):
        signals = some_signals(chosen, cut.layer, 15, constant=True)
        tokens = at_cut(signals, layer=cut.layer)
        for keep in range(1, 15):
            assert chosen.select(tokens, keep).kept.tolist() == list(range(keep))


@pytest.mark.parametrize(("name", "fields"), CALLS, ids=IDS)
def test_scores_are_float32(name, fields):
    """bfloat16 signals choose what the same numbers in float32 choose."""
    chosen = method_class(name)(**fields)
    for cut in chosen.cuts(model()):
        low = {s: t.bfloat16() for s, t in some_signals(chosen, cut.layer, 300).items()}
        high = {s: t.float() for s, t in low.items()}
        tokens = [at_cut(signals, layer=cut.layer) for signals in (low, high)]
        assert torch.equal(*(chosen.select(t, 140).kept for t in tokens))


@pytest.mark.parametrize(("name", "fields"), CALLS, ids=IDS)
def test_the_host_never_waits(name, fields):
    """Fake tensors have no values: whatever asked for one would raise."""
    chosen = method_class(name)(**fields)
    layer = chosen.cuts(model())[-1].layer
    tokens = at_cut(some_signals(chosen, layer, 15), layer=layer)
    with FakeTensorMode() as mode:
        signals = {signal: mode.from_tensor(t) for signal, t in tokens.signals.items()}
        assert chosen.select(replace(tokens, signals=signals), 6).count == 6
        assert transition(torch.ones(5, 4), torch.ones(5, 4)).shape == (5,)

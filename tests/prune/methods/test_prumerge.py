"""PruMerge, and what PruMerge+ shares with it: by hand, of a budget, and its own number."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kit.golden import Runner
from kit.merging import (
    CANVAS,
    check,
    check_prumerge,
    compare_prumerge,
    given_signals,
    make,
    outliers,
    same,
)
from vlmprune.prune.ops.topk import top_k
from vlmprune.prune.registry import method, method_class
from vlmprune.prune.select import most, select
from vlmprune.prune.tiling import Tiling

GOLDEN = {
    "prumerge": Runner("prumerge", lambda p: {"neighbours": p["k_neighbors"]}, compare_prumerge),
}


@pytest.mark.parametrize("name", ["prumerge", "prumerge_plus"])
@pytest.mark.parametrize("scores", ["cls", "received"])
@pytest.mark.parametrize("grid", [(4, 5), (6, 8)], ids=str)  # fewer and more than 33 tokens
@pytest.mark.parametrize("keep", [1, 2, 3, 9, 19])
def test_prumerge_of_a_budget(name, scores, grid, keep):
    chooser = method_class(name)(scores=scores)
    tokens = make(chooser, Tiling.single(*grid))
    centres = top_k(next(iter(tokens.signals.values())), max(1, keep - 1)).tolist()
    if name == "prumerge_plus":
        attended = max(1, round(len(centres) / 4))
        rest = sorted(set(range(tokens.num_tokens)) - set(centres[:attended]))
        spaced = len(centres) - attended
        centres = centres[:attended] + [rest[i * len(rest) // spaced] for i in range(spaced)]
    check_prumerge(chooser, tokens, chooser.select(tokens, keep), centres, aggregate=keep > 1)


def test_prumerge_by_hand():
    """Five tokens, three rows of one neighbour each: 3 with 1, 0 with 2, and the rest."""
    chooser = method_class("prumerge")(neighbours=1)
    attention = torch.tensor([0.25, 0.0625, 0.125, 0.5, 0.03125])
    keys = torch.tensor([[1.0, 0], [0, 1], [2, 0.5], [0.1, 3], [-1, -1]])[:, None]
    features = torch.tensor([1.0, 16, 64, 8, 32])[:, None]
    tokens = given_signals(chooser, Tiling.single(1, 5), attention, keys, features)
    chosen = chooser.select(tokens, 3)
    assert chosen.order.tolist() == [3, 0, -1]
    assert chosen.kept.tolist() == [0, 3]
    assert chosen.features.tolist() == [[8 + 1], [1 + 8], [1 + 8 + 1]]
    assert chosen.groups.tolist() == [[0, 0, 1, 1, 2, 2, 2], [3, 1, 0, 2, 1, 2, 4]]


@pytest.mark.parametrize("seed", range(5))
def test_prumerge_finds_its_own_number(seed):
    chooser = method_class("prumerge")(neighbours=4)
    tokens = make(chooser, Tiling.single(8, 9), seed=seed)
    weights = next(iter(tokens.signals.values()))
    count = outliers(weights)
    assert count > 2
    chosen = chooser.select_adaptive(tokens)
    check_prumerge(chooser, tokens, chosen, top_k(weights, count).tolist())
    assert same(chosen, chooser.select(tokens, count + 1))


@pytest.mark.parametrize(("highest", "count"), [([3.45, 3.6], 1), ([3.6, 3.7], 2), ([3, 3.4], 1)])
def test_prumerge_outliers_by_hand(highest, count):
    """Quartiles 1 and 2: what lies above 3.5 stands out; one token is kept where nothing does."""
    chooser = method_class("prumerge")(neighbours=0)
    tokens = make(chooser, Tiling.single(3, 3))
    next(iter(tokens.signals.values())).copy_(torch.tensor([*highest, 0, 1, 1, 1.5, 1.5, 2, 2]))
    assert chooser.select_adaptive(tokens).order.tolist() == [*[1, 0][:count], -1]


@pytest.mark.parametrize("name", ["prumerge", "prumerge_plus"])
def test_prumerge_where_nothing_stands_out(name):
    """The published code keeps no token, or crashes; here the most attended one stays."""
    chooser = method_class(name)()
    tokens = make(chooser, Tiling.single(3, 4))
    weights = next(iter(tokens.signals.values()))
    weights.fill_(0.1)
    spaced = [] if name == "prumerge" else [4, 8]
    assert chooser.select_adaptive(tokens).order.tolist() == [0, *spaced, -1]
    alone = chooser.select_adaptive(make(chooser, Tiling.single(1, 1)))
    check(alone, 1, 1)


@pytest.mark.parametrize("name", ["prumerge", "prumerge_plus"])
@given(st.integers(1, 40), st.integers(0, 40), st.integers(0, 2**31))
def test_prumerge_never_finds_more_than_it_declares(name, num_tokens, high, seed):
    chooser = method_class(name)(neighbours=2)
    tokens = make(chooser, Tiling.single(1, num_tokens), seed=seed)
    weights = next(iter(tokens.signals.values()))
    weights[:] = 0.01
    weights[: min(high, num_tokens)] = 0.9
    weights += torch.rand(num_tokens, generator=torch.Generator().manual_seed(seed)) * 1e-4
    selection = chooser.select_adaptive(tokens)
    check(selection, num_tokens, selection.count)
    assert selection.count <= chooser.most(num_tokens) <= num_tokens
    if name == "prumerge" and high == num_tokens // 4:
        assert selection.count == chooser.most(num_tokens)  # the bound is reached


@pytest.mark.parametrize("name", ["prumerge", "prumerge_plus"])
@pytest.mark.parametrize("newlines", ["drop", "keep"])
def test_prumerge_of_tiles_without_a_budget(name, newlines):
    chooser = method_class(name)(newlines=newlines)
    selection = select(chooser, make(chooser, CANVAS), None)
    check(selection, CANVAS.num_tokens, selection.count)
    assert selection.count <= most(chooser, CANVAS)
    assert (selection.order == -1).sum() == len(CANVAS.tiles)


def test_prumerge_needs_no_budget():
    for name in ("prumerge", "prumerge_plus"):
        assert method(name).adaptive
        assert not method(name, keep_ratio=0.5).adaptive

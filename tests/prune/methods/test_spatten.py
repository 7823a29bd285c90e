"""SpAtten: a cut at every layer, falling linearly."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kit.decoder import DEPTHS, at_cut, layers_of, model, stages
from torch import Tensor
from vlmprune.prune.budget import plan, tokens_per_layer
from vlmprune.prune.contract import ReceivedInLayer, Signal
from vlmprune.prune.errors import BudgetError
from vlmprune.prune.registry import method, method_class


@pytest.mark.parametrize(
    ("depth", "first"), [(4, 3), (5, 3), (6, 3), (23, 3), (24, 4), (32, 5), (40, 6), (80, 12)]
)
def test_spatten_cuts_every_layer_behind_the_first(depth, first):
    assert layers_of("spatten", depth) == list(range(first, depth))
    needs = method_class("spatten")().needs(model(depth))
    assert needs == tuple(ReceivedInLayer(layer) for layer in range(depth - 1))


def test_spatten_falls_linearly():
    assert stages(method("spatten", keep_tokens=10), 100, 6) == [(3, 70), (4, 40), (5, 10)]
    assert stages(method("spatten", keep_tokens=64), 576, 4) == [(3, 64)]
    # 27 cuts, 19 tokens each but for rounding: 512 / 27 = 18.96
    counts = [keep for _, keep in stages(method("spatten", keep_tokens=64), 576)]
    assert counts[:3] == [557, 538, 519] and counts[-2:] == [83, 64] and len(counts) == 27


@given(st.integers(1, 700), st.floats(0, 1, exclude_min=True), st.sampled_from(DEPTHS))
def test_spatten_ends_at_the_budget(num_tokens, ratio, depth):
    entering = tokens_per_layer(
        num_tokens, plan(num_tokens, [method("spatten", keep_ratio=ratio)], model(depth)), depth
    )
    keep = min(num_tokens, max(1, round(ratio * num_tokens)))
    assert entering[:3] == [num_tokens] * 3 and entering[-1] == keep
    first = layers_of("spatten", depth)[0]
    for layer in range(first, depth):
        part = (layer - first + 1) / (depth - first)
        assert abs(entering[layer] - (num_tokens + part * (keep - num_tokens))) <= 0.5 + 1e-9


def test_spatten_needs_a_budget_that_it_can_reach():
    with pytest.raises(BudgetError, match="spatten needs a budget"):
        method("spatten")
    call = method("spatten", average_tokens=400)
    entering = tokens_per_layer(576, plan(576, [call], model()), 32)
    assert sum(entering) / 32 == pytest.approx(400, abs=0.5)
    assert stages(method("spatten", keep_ratio=1.0), 576) == []


def test_spatten_sums_all_layers_so_far():
    """Token 1 is first in sum, 2 in the newest layer; 0 and 3 are equal."""
    spatten = method_class("spatten")()
    per_layer = [[0.0, 4, 0, 1], [1, 0, 1, 0], [0, 0, 2, 0]]
    signals: dict[Signal, Tensor] = {
        ReceivedInLayer(layer): torch.tensor(values) for layer, values in enumerate(per_layer)
    }
    tokens = at_cut(signals, layer=3, depth=6)
    picked = [spatten.select(tokens, keep).kept.tolist() for keep in (1, 2, 3)]
    assert picked == [[1], [1, 2], [0, 1, 2]]
    signals[ReceivedInLayer(3)] = torch.tensor([0.0, 0, 0, 9])
    assert spatten.select(at_cut(signals, layer=4, depth=6), 1).kept.tolist() == [3]

"""CATP: what it covers before the LLM, and what it ranks in the decoder."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kit.decoder import at_cut, in_decoder, layers_of, model, stages
from kit.greedy import TILINGS, circle, cover, given_signals, make_tokens, rand
from torch import Tensor
from vlmprune.prune.budget import plan, tokens_per_layer
from vlmprune.prune.contract import (
    Features,
    Hidden,
    MeanHidden,
    Signal,
    TextAttention,
    TextEmbeddings,
)
from vlmprune.prune.errors import MethodFieldError, UnsupportedModelError
from vlmprune.prune.registry import method, method_class
from vlmprune.prune.select import select
from vlmprune.prune.tiling import Tiling


@pytest.mark.parametrize("scope", ["image", "tile"])
def test_catp_is_the_plain_one(scope):
    method = method_class("catp")(scope=scope, alignment=1.5)
    tiling = TILINGS["2 x 2"]
    tokens = make_tokens(method, tiling)
    features, text = tokens.signals.values()
    parts = tiling.tile_patches(torch.device("cpu"))
    parts = [torch.cat(list(parts))] if scope == "image" else parts
    expected = []
    for part in parts:
        expected += part[cover(features[part], text, 15 // len(parts), 1.5)].tolist()
    assert select(method, tokens, 15).kept.tolist() == sorted(expected)


def test_catp_by_hand():
    """Three tokens at 0 degrees and one at 90, which adds 0.5 by coverage after the first pick.

    A second one of the three adds nothing, but at weight 1 the text gives it 0.5 more."""
    features, text = circle(0, 90, 0, 0), circle(0, 0)
    for weight, expected in ((0.7, [0, 1]), (1.3, [0, 2])):
        method = method_class("catp")(alignment=weight)
        tokens = given_signals(method, Tiling.single(2, 2), features, text)
        assert method.select(tokens, 2).kept.tolist() == expected


def test_catp_without_text_covers_only():
    method = method_class("catp")()
    features = rand(5, 12, 6)
    tokens = given_signals(method, Tiling.single(3, 4), features, torch.zeros(0, 6))
    expected = method_class("catp")(alignment=0).select(
        given_signals(method, Tiling.single(3, 4), features, rand(6, 2, 6)), 5
    )
    assert torch.equal(method.select(tokens, 5).kept, expected.kept)


@pytest.mark.parametrize(
    ("depth", "layer"),
    [(4, 1), (5, 1), (6, 1), (24, 4), (27, 5), (28, 6), (32, 6), (36, 6), (40, 10), (80, 20)],
)
def test_catp_layers(depth, layer):
    catp = method_class("catp")()
    cuts = [(cut.layer, cut.images) for cut in catp.cuts(model(depth))]
    assert cuts == [(0, "each"), (layer + 1, "context"), (layer + 2, "query")]
    assert catp.needs(model(depth)) == (
        Features(),
        TextEmbeddings(),
        TextAttention(layer - 1),
        TextAttention(layer),
        Hidden(layer + 1),
        MeanHidden(layer + 1, "query"),
        Hidden(layer + 2),
        MeanHidden(layer + 2, "context"),
    )


def test_catp_takes_a_layer():
    assert layers_of("catp", 32, layer=1) == [0, 2, 3]
    assert layers_of("catp", 32, layer=29) == layers_of("catp", 32, layer=-3) == [0, 30, 31]
    for layer in (0, 30, -1):
        with pytest.raises(MethodFieldError, match=r"layer=.*1\.\.29"):
            layers_of("catp", 32, layer=layer)
    with pytest.raises(UnsupportedModelError, match="late=False"):
        layers_of("catp", 3)
    assert layers_of("catp", 3, late=False) == [0]


@pytest.mark.parametrize(("depth", "layer"), [(4, 1), (6, 1), (32, 6), (40, 10)])
def test_catp_cuts_half_of_it_before_the_llm(depth, layer):
    call = method("catp", keep_tokens=64)
    assert stages(call, 576, depth, "context") == [(0, 320), (layer + 1, 64)]
    assert stages(call, 576, depth, "query") == [(0, 320), (layer + 2, 64)]
    assert stages(method("catp", keep_tokens=64, late=False), 576, depth, "context") == [(0, 64)]


@given(st.integers(2, 700), st.integers(1, 700))
def test_catp_rounds_what_stays_down(num_tokens, keep):
    for images in ("context", "query"):
        counts = [
            count for _, count in stages(method("catp", keep_tokens=keep), num_tokens, 32, images)
        ]
        if keep >= num_tokens:
            assert counts == []
            continue
        half = math.floor(num_tokens * (1 - (1 - keep / num_tokens) / 2) + 1e-9)
        assert counts == ([half, keep] if half > keep else [keep])


def test_catp_counts_the_cost_of_the_query():
    call = method("catp", average_tokens=100)
    entering = tokens_per_layer(576, plan(576, [call], model()), 32)
    assert sum(entering) / 32 == pytest.approx(100, abs=0.7)


def context_signals(before, after, hidden, query, *, layer: int = 7) -> dict[Signal, Tensor]:
    return {
        TextAttention(layer - 2): torch.tensor(before),
        TextAttention(layer - 1): torch.tensor(after),
        Hidden(layer): torch.tensor(hidden),
        MeanHidden(layer, "query"): torch.tensor(query),
    }


def test_catp_context_by_hand():
    """Attention grows by 0.3, 0 (it falls), 0.1, 0; cosines are 0, 1, 0.8, -1, times 0.6."""
    before, after = [0.1, 0.9, 0.1, 0.2], [0.4, 0.1, 0.2, 0.2]
    hidden = [[0.0, 2.0], [3.0, 0.0], [4.0, 3.0], [-1.0, 0.0]]
    signals = context_signals(before, after, hidden, [5.0, 0.0])
    orders = {
        0.6: [1, 2, 0, 3],  # 0.3, 0.6, 0.58, -0.6
        0.4: [2, 1, 0, 3],  # 0.3, 0.4, 0.42, -0.4
        0.0: [0, 2, 1, 3],  # 0.3, 0, 0.1, 0: the lower of two
    }
    for similarity, order in orders.items():
        catp = method_class("catp")(similarity=similarity)
        for keep in (1, 2, 3):
            kept = select(catp, at_cut(signals, layer=7), keep).kept.tolist()
            assert kept == sorted(order[:keep]), (similarity, keep)


def test_catp_ranks_all_images_of_the_context_together():
    """Two images of three tokens follow one another; two tokens of the second one stay."""
    catp = method_class("catp")()
    after = [0.1, 0.0, 0.1, 0.5, 0.2, 0.4]
    signals = context_signals([0.0] * 6, after, [[1.0, 1.0]] * 6, [1.0, 0.0])
    assert select(catp, at_cut(signals, layer=7), 2).kept.tolist() == [3, 5]


def test_catp_query_by_hand():
    """Cosines with the context, whatever the lengths: 0.6, 0.8, 0 (a token of zeros), -1, 0.8."""
    hidden = torch.tensor([[6.0, 8], [4, 3], [0, 0], [-2, 0], [4, 3]])
    signals: dict[Signal, Tensor] = {
        Hidden(8): hidden,
        MeanHidden(8, "context"): torch.tensor([0.5, 0.0]),
    }
    order = [1, 4, 0, 2, 3]
    for keep in (1, 2, 3, 4):
        kept = select(method_class("catp")(), at_cut(signals, layer=8), keep).kept.tolist()
        assert kept == sorted(order[:keep])


def test_hidden_states_are_compared_in_float32():
    for layer in (7, 8):
        catp, tokens = in_decoder("catp", {}, layer)
        low = {s: t.bfloat16() if isinstance(s, Hidden) else t for s, t in tokens.signals.items()}
        high = {s: t.float() for s, t in low.items()}
        kept = [catp.select(at_cut(s, layer=layer), 20).kept for s in (low, high)]
        assert torch.equal(*kept)

"""ToDRE: what it disperses before the LLM, and what it drops in the decoder."""

from dataclasses import replace

import pytest
import torch
from kit.decoder import TILED, at_cut, layers_of, model, stages
from kit.greedy import TILINGS, circle, disperse, given_signals, make_tokens
from vlmprune.prune.budget import plan
from vlmprune.prune.contract import (
    ClsAttention,
    Features,
    PixelSeed,
    ReceivedAttention,
    TextAttention,
)
from vlmprune.prune.registry import method, method_class
from vlmprune.prune.select import most, select
from vlmprune.prune.tiling import Block, Tiling


def test_todre_by_hand():
    """The farthest from 0 degrees is 160. Then 150 has the smaller sum of cosines (-0.87 + 0.98;
    60: 0.50 - 0.17), but is nearer to one pick (0.98) than 60 is (0.50)."""
    features, scores = circle(0, 150, 160, 60), [0.9, 0.3, 0.1, 0.2]
    for rule, expected in (("max_sum", [0, 1, 2]), ("k_center", [0, 2, 3])):
        method = method_class("todre")(rule=rule)
        tokens = given_signals(method, Tiling.single(2, 2), features, scores)
        assert method.select(tokens, 3).kept.tolist() == expected


@pytest.mark.parametrize("pivot", ["cls", "received"])
def test_todre_starts_where_attention_is_largest(pivot):
    """In the thumbnail of a tiled image, among all frames of a video."""
    method = method_class("todre")(pivot=pivot)
    signal = (ClsAttention if pivot == "cls" else ReceivedAttention)(23)
    for tiling, start in (("2 x 2 with newlines", 5), ("without padding", 5), ("video", 20)):
        tokens = make_tokens(method, TILINGS[tiling].without_newlines())
        scores = torch.zeros(tokens.num_tokens)
        scores[[3, 5, 20, 22]] = torch.tensor([0.1, 0.2, 0.4, 0.4])
        tokens = replace(tokens, signals={**tokens.signals, signal: scores})
        assert method.select(tokens, 1).kept.tolist() == [start]
        features = tokens.signals[Features()]
        assert method.select(tokens, 9).kept.tolist() == sorted(
            disperse(features, start, 9, "max_sum")
        )


def test_todre_starts_in_a_thumbnail_behind_its_crops():
    tiling = Tiling((Block((2,), (3,)),) * 4, thumbnail=3)
    for pivot, starts in (("received", {20}), ("random", {*range(18, 24)})):
        method = method_class("todre")(pivot=pivot)
        tokens = make_tokens(method, tiling)
        scores = torch.zeros(24)
        scores[[5, 20, 22]] = torch.tensor([0.9, 0.4, 0.2])
        found = []
        for seed in range(10_000, 10_040):
            given = {ReceivedAttention(23): scores, PixelSeed(): torch.tensor(seed)}
            own = {need: given.get(need, value) for need, value in tokens.signals.items()}
            found += method.select(replace(tokens, signals=own), 1).kept.tolist()
        assert set(found) == starts


def test_todre_random_pivot_depends_on_the_pixels():
    method = method_class("todre")(pivot="random")
    starts = {}
    for tiling in ("2 x 2", "video", "plain"):
        tokens = make_tokens(method, TILINGS[tiling].without_newlines())
        found = []
        for seed in range(10_000, 10_040):
            signals = {**tokens.signals, PixelSeed(): torch.tensor(seed)}
            found += method.select(replace(tokens, signals=signals), 1).kept.tolist()
        starts[tiling] = set(found)
    assert starts == {"2 x 2": {*range(16)}, "video": {*range(24)}, "plain": {*range(15)}}


@pytest.mark.parametrize(("depth", "layer"), [(4, 3), (5, 4), (6, 5), (28, 24), (32, 28), (40, 35)])
def test_todre_cuts_behind_seven_eighths(depth, layer):
    todre = method_class("todre")()
    early, late = todre.cuts(model(depth))
    assert (early.layer, early.adaptive) == (0, False)
    assert (late.layer, late.adaptive, late.images) == (layer, True, "each")
    assert todre.needs(model(depth))[-1] == TextAttention(layer - 1, rows="text")


def test_todre_signals_of_the_encoder_come_first():
    shape = model()
    assert method_class("todre")().needs(shape)[:2] == (Features(), ClsAttention(23))
    seeded = method_class("todre")(pivot="random")
    assert seeded.needs(shape)[:2] == (Features(), PixelSeed())
    assert len(seeded.needs(shape)) == 3


@pytest.mark.parametrize(
    ("received", "tau", "stays"),
    [
        ([0.25, 0.125, 0.125], 0.5, True),  # not below
        ([0.25, 0.125, 0.0625], 0.5, False),
        ([0.04, 0.04, 0.03], 0.1, True),  # together, not each
        ([0.04, 0.03, 0.02], 0.1, False),
        ([0.0, 0.0], 0.0, True),
        ([0.5, 0.25], 1.0, False),
    ],
)
def test_todre_keeps_all_or_nothing(received, tau, stays):
    todre = method_class("todre")(tau=tau)
    tokens = at_cut({TextAttention(27, rows="text"): torch.tensor(received)}, layer=28)
    kept = select(todre, tokens, None).kept
    assert kept.dtype == torch.int64
    assert kept.tolist() == (list(range(len(received))) if stays else [])


@pytest.mark.parametrize("depth", [4, 6, 32])
def test_todre_as_published(depth):
    (_, late) = layers_of("todre", depth)
    early, adaptive = plan(2880, [method("todre")], model(depth))
    assert (early.layer, early.keep, early.adaptive) == (0, 720, False)
    assert (adaptive.layer, adaptive.keep, adaptive.adaptive) == (late, 720, True)
    assert stages(method("todre", keep_ratio=0.1), 2880, depth) == [(0, 288), (late, 288)]
    assert stages(method("todre", keep_ratio=0.1, late=False), 2880, depth) == [(0, 288)]
    assert stages(method("todre", late=False), 2880, depth) == [(0, 720)]
    assert not method("todre").adaptive


@pytest.mark.parametrize("num_tokens", [1, 2, 6, 10, 2880])
def test_a_quarter_is_rounded_as_ratios_are(num_tokens):
    published = method_class("todre")().most(num_tokens)
    assert published == (
        stages(method("todre", keep_ratio=0.25), num_tokens)[0][1] if num_tokens > 1 else 1
    )


def test_the_quarter_is_of_all_tokens_newlines_included():
    todre = method_class("todre")()
    assert most(todre, TILED) == stages(method("todre"), TILED.num_tokens)[0][1] == 10

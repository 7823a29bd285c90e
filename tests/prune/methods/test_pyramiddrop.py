"""PyramidDrop: the layer that it reads."""

from collections.abc import Mapping

import pytest
import torch
from kit.decoder import at_cut, average, model, stages
from kit.golden import Golden, Runner
from kit.schedules import compare_stages, text_attention
from torch import Tensor
from vlmprune.prune.contract import Method, Signal, TextAttention
from vlmprune.prune.registry import method, method_class


def _pyramiddrop(golden: Golden, method: Method) -> None:
    def signals(stage: int, layer: int, alive: Tensor) -> Mapping[Signal, Tensor]:
        query, keys = golden.arrays[f"q_last_{stage}"][:, None], golden.arrays[f"k_{stage}"]
        row = text_attention(golden, query, keys, alive)
        return {TextAttention(layer, rows="last", ahead=True): row}

    compare_stages(golden, method, signals)


GOLDEN = {
    "pdrop": Runner(
        "pyramiddrop",
        lambda p: {"layers": tuple(p["layers_1based"]), "ratios": tuple(p["ratios"])},
        _pyramiddrop,
    ),
}


def test_pyramiddrop_reads_the_layer_that_is_cut():
    rows = {8: [0.1, 0.4, 0.3, 0.2], 16: [0.3, 0.1, 0.2, 0.4], 24: [0.4, 0.3, 0.2, 0.1]}
    signals = {TextAttention(k, rows="last", ahead=True): torch.tensor(r) for k, r in rows.items()}
    chosen = method_class("pyramiddrop")()
    for layer, kept in ((8, [1, 2]), (16, [0, 3]), (24, [0, 1])):
        assert chosen.select(at_cut(signals, layer=layer), 2).kept.tolist() == kept


def test_signals_of_pyramiddrop():
    row = [TextAttention(layer, rows="last", ahead=True) for layer in (8, 16, 24)]
    assert list(method_class("pyramiddrop")().needs(model())) == row


def test_ratios_halve_at_any_number_of_layers():
    call = method("pyramiddrop", layers=(6, 12, 18, 24))
    assert stages(call, 576) == [(6, 288), (12, 144), (18, 72), (24, 36)]


def test_earlier_cuts_reach_the_averages_of_the_tables():
    for goal in (192, 128, 64):
        call = method("pyramiddrop", layers=(2, 8, 16), average_tokens=goal)
        assert average(call, 576) == pytest.approx(goal, abs=1)

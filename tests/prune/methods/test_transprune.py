"""TransPrune: transitions and scores by hand."""

import math
from collections.abc import Mapping

import pytest
import torch
from kit.decoder import at_cut, model
from kit.golden import CLIP_L, Golden, Runner
from kit.schedules import compare_stages, text_attention
from torch import Tensor
from vlmprune.prune.contract import Method, ModuleStep, Signal, TextAttention
from vlmprune.prune.methods.decoder.transprune import transition
from vlmprune.prune.registry import method_class


def _transprune(golden: Golden, method: Method) -> None:
    # A file numbers layers from 1, and has one row for both modules of a layer.
    rows = {
        layer - 1: row[golden.params["image_start"] :] / 2
        for layer, row in zip(
            golden.params["accumulating_layers_1based"], golden.arrays["ttv"], strict=True
        )
    }

    def signals(stage: int, layer: int, alive: Tensor) -> Mapping[Signal, Tensor]:
        queries, keys = golden.arrays[f"q_text_{stage}"], golden.arrays[f"k_{stage}"]
        seen: dict[Signal, Tensor] = {
            step: rows[step.layer][alive] for step in _steps(method) if step.layer < layer
        }
        read = text_attention(golden, queries, keys, alive)
        return seen | {TextAttention(layer, rows="text", ahead=True): read}

    compare_stages(golden, method, signals)


def _transprune_ttv(golden: Golden, method: Method) -> None:
    arrays, first = golden.arrays, _steps(method)[0].layer
    inputs = {"attention": ("attn_in", "attn_out"), "mlp": ("ffn_in", "ffn_out")}
    ttv = sum(
        step.read(*(arrays[name] for name in inputs[step.module]))
        for step in _steps(method)
        if step.layer == first
    )
    torch.testing.assert_close(ttv, arrays["ttv"], rtol=1e-4, atol=1e-8)


def _steps(method: Method) -> list[ModuleStep]:
    return [signal for signal in method.needs(CLIP_L) if isinstance(signal, ModuleStep)]


GOLDEN = {
    "transprune": Runner(
        "transprune", lambda p: {"layers": tuple(p["pruning_layers_1based"])}, _transprune
    ),
    "transprune_ttv": Runner("transprune", lambda p: {}, _transprune_ttv),
}


def test_a_transition_turns_and_stretches():
    before = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 4.0]])
    after = torch.tensor([[0.0, 1.0], [0.0, 1.0], [-6.0, -8.0]])
    # lengths: 1 of 1, 1 of 2, 10 of 5; angles: right, none, half a turn
    weights = [math.exp(1 - cosine) for cosine in (0, 1, -1)]
    expected = [r * w / sum(weights) for r, w in zip((1, 0.5, 2), weights, strict=True)]
    torch.testing.assert_close(transition(before, after), torch.tensor(expected))


def test_a_transition_is_read_in_float32():
    generator = torch.Generator().manual_seed(0)
    before, after = (torch.randn(9, 16, generator=generator).bfloat16() for _ in range(2))
    read = transition(before, after)
    assert read.dtype == torch.float32
    torch.testing.assert_close(read, transition(before.float(), after.float()), rtol=0, atol=0)


def test_a_transition_of_zeros_is_a_number():
    before, after = torch.ones(3, 4), torch.ones(3, 4)
    before[0], after[:2] = 0, 0
    read = transition(before, after)
    assert read.isfinite().all() and torch.equal(read[:2], torch.zeros(2)) and read[2] > 0


def transprune_signals(first: list[float], last: list[float], read: list[float], cut: int = 9):
    """Transitions of the layers 6 and 8 (their MLP and their attention), and what the text reads.

    A cut at layer 9 has seen both, one at layer 7 only the first.
    """
    zero = torch.zeros(len(read))
    signals = {
        ModuleStep(layer, module, transition): zero
        for layer in range(6, cut)
        for module in ("attention", "mlp")
    }
    signals[ModuleStep(6, "mlp", transition)] = torch.tensor(first)
    signals[ModuleStep(8, "attention", transition)] = torch.tensor(last)
    signals[TextAttention(cut, rows="text", ahead=True)] = torch.tensor(read)
    return signals


@pytest.mark.parametrize(("fields", "kept"), [({}, [0, 2]), ({"scores": "ttv"}, [2, 3])])
def test_transprune_adds_shares_of_both_scores(fields, kept):
    """Transitions 10, 20, 30, 40 are 0.1 .. 0.4 of their sum, and what the text reads 0.5, 0.25,
    0.25 and 0: together 0.6, 0.45, 0.55 and 0.4. Read alone would keep tokens 0 and 1."""
    signals = transprune_signals([9, 0, 29, 15], [1, 20, 1, 25], [0.02, 0.01, 0.01, 0])
    chosen = method_class("transprune")(**fields)
    assert chosen.select(at_cut(signals, layer=9), 2).kept.tolist() == kept


def test_transprune_sums_over_modules_and_layers():
    """Neither layer and neither module alone chooses what their sum does."""
    signals = transprune_signals([9, 0, 6, 5], [0, 9, 5, 6], [0.25] * 4)
    ttv = method_class("transprune")(scores="ttv")
    assert ttv.select(at_cut(signals, layer=9), 2).kept.tolist() == [2, 3]


@pytest.mark.parametrize("scores", ["both", "ttv"])
def test_transprune_sees_no_layer_behind_the_cut(scores):
    signals = transprune_signals([4, 3, 2, 1], [0, 0, 50, 90], [0.25] * 4)
    signals[TextAttention(7, rows="text", ahead=True)] = torch.full((4,), 0.25)
    signals[TextAttention(9, rows="text", ahead=True)] = torch.tensor([0, 0, 0, 0.9])
    chosen = method_class("transprune")(scores=scores)
    assert chosen.select(at_cut(signals, layer=7), 2).kept.tolist() == [0, 1]


def test_transprune_without_any_attention_goes_by_transitions():
    signals = transprune_signals([1, 2, 3, 4], [0] * 4, [0] * 4)
    chosen = method_class("transprune")()
    assert chosen.select(at_cut(signals, layer=9), 2).kept.tolist() == [2, 3]


@pytest.mark.parametrize("scores", ["both", "ttv"])
def test_signals_of_transprune(scores):
    steps = {ModuleStep(k, m, transition) for k in range(6, 12) for m in ("attention", "mlp")}
    read = {TextAttention(layer, rows="text", ahead=True) for layer in (7, 9, 12)}
    needs = method_class("transprune")(scores=scores).needs(model())
    assert len(needs) == len(set(needs))
    assert set(needs) == (steps | read if scores == "both" else steps)

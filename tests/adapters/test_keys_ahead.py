"""Keys that are projected ahead of a cut, for the attention on its uncut input, are used again."""

from __future__ import annotations

import torch
from kit import zoo
from kit.decoder_by_hand import expected
from kit.oracle import Truth
from kit.recorders import DEPTH, ROWS, RULES, Recorder, call
from vlmprune.adapters.patching import patch
from vlmprune.adapters.places.prefill import Prefill
from vlmprune.prune.contract import TextAttention


def projections(model) -> list[list[int]]:
    """Per layer, the tokens of every call of its key projection; noted from now on."""
    lengths: list[list[int]] = []
    for layer in model.base_model.language_model.layers:
        project, noted = layer.self_attn.k_proj, []

        def count(given, forward=project.forward, noted=noted):
            noted.append(given.shape[1])
            return forward(given)

        project.__dict__["forward"] = count
        lengths.append(noted)
    return lengths


def longest(truth: Truth) -> list[int]:
    """Tokens of the longest row that enter each layer."""
    lengths = [truth.layer_lengths(row) for row in range(len(truth.rows))]
    return [max(of_layer) for of_layer in zip(*lengths, strict=True)]


@zoo.WHOLE
def test_keys_made_ahead_are_used_again(case, monkeypatch):
    truth = expected(case, ROWS).truth
    entered = longest(truth)
    whole = longest(expected(case, ROWS, cuts=()).truth)[0]
    # The layers that are cut project the keys of their uncut input, and nothing else.
    once = [[whole], [whole], [entered[1]], [entered[2]]]
    again = [[whole], [whole, entered[1]], [entered[1]], [entered[2], entered[3]]]
    inputs, logits = case.inputs(ROWS), []
    ahead = tuple(TextAttention(layer, rows, ahead=True) for layer in (1, 3) for rows in RULES)
    for wants, expected_lengths in (
        (ahead, once),
        ((), [[n] for n in entered]),
        (ahead, again),
    ):
        if expected_lengths is again:
            monkeypatch.setattr(Prefill, "keys_of", lambda *args: None)
        model, recorder = case.model(), Recorder(wants=wants)
        lengths = projections(model)
        patch(model, call(recorder), positions="original")
        with torch.no_grad():
            out = model(**inputs)
        assert lengths == expected_lengths
        logits.append(out.logits)
    for other in logits[1:]:
        torch.testing.assert_close(logits[0], other, atol=1e-5, rtol=1e-5)


@zoo.BOTH_FAMILIES
def test_keys_made_ahead_while_decoding_and_training(case, monkeypatch):
    model = case.model()
    lengths = projections(model)
    ahead = tuple(TextAttention(layer, ahead=True) for layer in (1, 3))
    patch(model, call(Recorder(wants=ahead)))
    model.generate(**case.inputs(ROWS), max_new_tokens=3, do_sample=False)
    assert [of_layer[1:] for of_layer in lengths] == [[1, 1]] * DEPTH
    gradients = []
    for again in (True, False):
        if not again:
            monkeypatch.setattr(Prefill, "keys_of", lambda *args: None)
        model = case.model().requires_grad_(True)
        patch(model, call(Recorder(wants=ahead)))
        model(**case.inputs(ROWS)).logits.square().mean().backward()
        layers = model.base_model.language_model.layers
        gradients.append([layer.self_attn.k_proj.weight.grad for layer in layers])
    for one, other in zip(*gradients, strict=True):
        assert one.abs().max() > 1e-6
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)

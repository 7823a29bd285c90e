"""Decoding with the neurons that the prompt chose: it equals masks on the whole MLP, computed
slowly, and leaves nothing behind."""

from __future__ import annotations

import math

import pytest
import torch
import vlmprune
from kit import zoo
from kit.decoding import generated, logits_of
from kit.oracle import decoder_of
from kit.snapshots import differences, snapshot
from vlmprune.adapters.cache_names import CACHE
from vlmprune.adapters.core_mlp import CoreMLP
from vlmprune.adapters.registry import family_of
from vlmprune.eval.measure.flops import model_cost
from vlmprune.prune.contract import Thinned

RHO, SHARE, STEPS = 0.25, 0.4, 4  # positions of quantiles are exact in float32
LLAVA = zoo.CASES["llava-clip-llama"]


def chosen_token_by_token(rows: list[list[float]], rho: float, share: float) -> list[int]:
    """The paper's core neurons of a sentence."""
    counts = [0] * len(rows[0])
    for row in rows:
        positive = sorted(a for a in row if a > 0)
        least = positive[math.ceil(rho * (len(positive) - 1))] if positive else math.inf
        counts = [n + (a >= least) for n, a in zip(counts, row, strict=True)]
    ranked = sorted(range(len(counts)), key=lambda i: (-counts[i], i))
    return sorted(ranked[: max(1, round(share * len(counts)))])


def decoded(model, inputs: dict, **fields):
    """Logits of each step, and what the patch says."""
    with vlmprune.patch(model, "corematching", keep_ratio=0.5, rho=RHO, **fields) as handle:
        return logits_of(generated(model, inputs, STEPS)), handle.last


@zoo.BOTH_FAMILIES
def test_decoding_is_that_of_an_mlp_with_the_others_masked(case):
    model, inputs = case.model(), case.inputs(zoo.SINGLE)
    found, last = decoded(model, inputs, neurons=SHARE)
    seen: dict[int, list[list[float]]] = {}

    def watch(layer, given):
        """In the prompt, choose; in steps, mask what was not chosen."""
        (activations,) = given
        if activations.shape[1] > 1:
            seen[layer] = activations[0].tolist()
            return None
        mask = torch.zeros(activations.shape[-1])
        mask[chosen_token_by_token(seen[layer], RHO, SHARE)] = 1
        return (activations * mask,)

    hooks = [
        layer.mlp.down_proj.register_forward_pre_hook(lambda _, given, n=n: watch(n, given))
        for n, layer in enumerate(decoder_of(model).layers)
        if n >= 1
    ]
    expected, _ = decoded(model, inputs)
    for hook in hooks:
        hook.remove()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert {n: kept.tolist() for n, kept in last.neurons.items()} == {
        n: chosen_token_by_token(rows, RHO, SHARE) for n, rows in seen.items()
    }
    dense, last = decoded(model, inputs)
    assert not last.neurons and torch.equal(dense[0], found[0])
    assert not torch.allclose(dense[1], found[1])


def test_an_mlp_of_all_its_neurons_is_the_mlp():
    """On every kind of MLP that is thinned; those of other kinds are refused."""
    thinned = 0
    for case in zoo.CASES.values():
        model = case.model()
        family = family_of(model)
        try:
            with vlmprune.patch(model, "corematching", layer=-2, neurons=SHARE):
                pass
        except (vlmprune.UnsupportedModelError, vlmprune.MissingSignalError) as refused:
            assert "neurons" in str(refused) or "cuts in front" in str(refused)
            continue
        mlp = getattr(family.text_model.layers[-1], family.layer_names.mlp)
        thinned += 1
        hidden = torch.randn(1, 1, mlp.gate_proj.in_features)
        with torch.no_grad():
            own = CoreMLP.of(mlp, torch.arange(mlp.down_proj.in_features))(hidden)
            torch.testing.assert_close(own, mlp(hidden), rtol=1e-5, atol=1e-6)
    assert thinned >= 10


def test_whole_images_are_decoded_with_core_neurons_too():
    """No token leaves, and nothing but decoded tokens is another."""
    model, inputs = LLAVA.model(), LLAVA.inputs(zoo.SINGLE)
    dense = logits_of(generated(model, inputs, STEPS))
    before = snapshot(model)
    with vlmprune.patch(model, "corematching", keep_ratio=1.0, neurons=SHARE) as handle:
        out = generated(model, inputs, STEPS)
        found = logits_of(out)
        assert torch.equal(found[0], dense[0]) and not torch.allclose(found[1], dense[1])
        assert not handle.last.pruned and sorted(handle.last.neurons) == [1, 2, 3]
        handle.set("corematching", keep_ratio=1.0)
        assert torch.equal(logits_of(generated(model, inputs, STEPS)), dense)
    assert differences(before, snapshot(model)) == []


def test_several_new_tokens_pass_all_neurons():
    model, inputs = LLAVA.model(), LLAVA.inputs(zoo.SINGLE)
    more = torch.tensor([[zoo.FIRST_WORD + n for n in range(3)]])
    found = []
    for fields in ({"neurons": SHARE}, {}):
        patched = vlmprune.patch(model, "corematching", keep_ratio=0.5, **fields)
        with torch.no_grad(), patched:
            cache = model(**inputs, use_cache=True)[CACHE]
            found.append(model(input_ids=more, **{CACHE: cache}).logits)
    assert torch.equal(*found)


def test_what_cannot_be_decoded_so_is_refused():
    model = LLAVA.model()
    with vlmprune.patch(model, "corematching", keep_ratio=0.5, neurons=SHARE):
        with pytest.raises(vlmprune.UnsupportedFeatureError, match="one prompt at a time"):
            model(**LLAVA.inputs(zoo.BATCH))
        with pytest.raises(vlmprune.UnsupportedFeatureError, match="use_cache=False every step"):
            generated(model, LLAVA.inputs(zoo.SINGLE), 2, use_cache=False)
        model(**LLAVA.inputs(zoo.SINGLE), use_cache=False)  # no step follows
        layer = decoder_of(model).layers[2]
        layer.mlp.up_proj = torch.nn.Sequential(layer.mlp.up_proj)
        with pytest.raises(vlmprune.UnsupportedFeatureError, match="merge adapters"):
            model(**LLAVA.inputs(zoo.SINGLE))
    with pytest.raises(vlmprune.UnsupportedModelError, match=r"layer 2.*leave neurons out"):
        vlmprune.patch(model, "corematching", neurons=SHARE)
    with pytest.raises(vlmprune.MethodFieldError, match=r"neurons=0 .*give a number above 0"):
        vlmprune.method("corematching", neurons=0)


def test_flops_of_decoding_count_the_neurons_that_are_left():
    cost = model_cost(LLAVA.model())
    dense = cost.decode([10] * 4, 2)
    thinned = {n: Thinned(layer=n, neurons=0.25) for n in (1, 2)}
    assert dense - cost.decode([10] * 4, 2, thinned) == 2 * cost.layers[1].mlp * 3 // 4

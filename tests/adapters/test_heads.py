"""Heads and values that attention leaves out: they equal a slow attention that computes all and
masks, in prompts and in decoded tokens, and nothing is left of them."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
import vlmprune
from kit import zoo
from kit.decoding import generated, logits_of
from kit.snapshots import differences, snapshot
from transformers.models.llama import modeling_llama
from vlmprune.adapters.cache_names import CACHE
from vlmprune.eval.measure.flops import model_cost
from vlmprune.prune.budget import Budget, MethodCall
from vlmprune.prune.contract import Selection, Thinned
from vlmprune.prune.methods.decoder.spatten import SpAtten

STEPS, LLAVA = 3, zoo.CASES["llava-clip-llama"]
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def deep() -> zoo.Case:
    """Six layers, which `spatten` cuts in front of the last three, and two queries a key head."""

    def config():
        made = copy.deepcopy(LLAVA.config())
        text = made.text_config
        text.num_hidden_layers, text.num_attention_heads, text.num_key_value_heads = 6, 8, 4
        text.head_dim = text.hidden_size // 8
        return made

    return replace(LLAVA, name="llava-deep", config=config)


@dataclass(frozen=True, kw_only=True)
class Told(SpAtten):
    """Its cuts, without choosing: what stays was noted before."""

    kept: ClassVar[list[list[int]]] = []

    def select(self, tokens, keep):
        own = self.kept[tokens.layer - 3]
        alive = [n for n in range(99) if tokens.layer == 3 or n in self.kept[tokens.layer - 4]]
        return Selection(kept=torch.tensor([alive.index(n) for n in own]))


class Slowly:
    """Attention head by head and row by row."""

    def __init__(self, heads: float, values: float, depth: int = 6) -> None:
        self.heads, self.values, self.depth = heads, values, depth
        self.given: dict[int, list[float]] = {}
        self.alive: dict[int, list[int]] = {}
        self.received: dict[int, list[float]] = {}

    def __call__(self, module, query, key, value, mask, scaling, **kwargs):
        layer, group = module.layer_idx, query.shape[1] // key.shape[1]
        prompt = query.shape[2] > 1
        if prompt:
            self.alive[layer] = self.chosen(layer, key.shape[1])
        output = torch.zeros_like(query)
        totals, given = torch.zeros(key.shape[2]), [0.0] * key.shape[1]
        for head in range(query.shape[1]):
            own = head // group
            logits = query[0, head] @ key[0, own].T * scaling
            logits = logits if mask is None else logits + mask[0, 0]
            attention = logits.softmax(-1)
            if own not in self.alive[layer]:
                continue
            totals += attention.sum(0) / query.shape[1]
            for row, weights in enumerate(attention):
                kept = self.read(weights, None if mask is None else mask[0, 0, row])
                output[0, head, row] = weights[kept] @ value[0, own][kept]
            given[own] += float(output[0, head].abs().sum())
        if prompt:
            self.given[layer], self.received[layer] = given, totals.tolist()
        return output.transpose(1, 2), None

    def chosen(self, layer: int, count: int) -> list[int]:
        before = self.alive.get(layer - 1, list(range(count)))
        done = max(0, layer - 2) / (self.depth - 3)
        keep = max(1, round((1 - (1 - self.heads) * done) * count))
        totals = [sum(self.given[n][head] for n in range(layer)) for head in range(count)]
        return sorted(sorted(before, key=lambda head: (-totals[head], head))[:keep])

    def read(self, weights: torch.Tensor, mask: torch.Tensor | None) -> list[int]:
        numbers = weights.tolist()
        seen = len(numbers) if mask is None else int((mask > -1e30).sum())
        most = math.ceil(seen * self.values - 1e-6)
        return sorted(sorted(range(len(numbers)), key=lambda j: (-numbers[j], j))[:most])


@pytest.mark.parametrize(("heads", "values"), [(0.5, 1.0), (1.0, 0.4), (0.25, 0.6)])
def test_it_equals_attention_computed_slowly(heads, values, monkeypatch):
    case = deep()
    inputs, found = case.inputs(zoo.SINGLE), []
    for attention in ("sdpa", "eager"):
        call = vlmprune.method("spatten", keep_ratio=0.4, heads=heads, values=values)
        model = case.model(attention)
        with vlmprune.patch(model, call, record=True) as handle:
            found.append(logits_of(generated(model, inputs, STEPS)))
    last, slowly = handle.last, Slowly(heads, values)
    monkeypatch.setattr(Told, "kept", [stage.kept[0].tolist() for stage in last.stages])
    monkeypatch.setattr(modeling_llama, "eager_attention_forward", slowly)
    told = MethodCall(Told(), Budget("keep_ratio", 0.4))
    with vlmprune.patch(model, told):
        expected = logits_of(generated(model, inputs, STEPS))
    for logits in found:
        torch.testing.assert_close(logits, expected, **CLOSE)
    kept = {n: heads_[0].tolist() for n, heads_ in last.heads.items()}
    assert kept == {n: alive for n, alive in slowly.alive.items() if len(alive) < 4}
    assert bool(kept) == (heads < 1)
    # Tokens are ranked by what heads that are in give them: here, at the first cut after heads went
    first = inputs["input_ids"][0].tolist().index(zoo.IMAGE)
    scores = last.stages[1].scores[0]
    alive = ~scores.isnan()
    count = int(alive.sum())
    of_layer = torch.tensor(slowly.received[3][first : first + count])
    before = sum(torch.tensor(slowly.received[n])[first:][: len(scores)] for n in range(3))
    torch.testing.assert_close(scores[alive], before[alive] + of_layer, **CLOSE)


@zoo.BOTH_FAMILIES
def test_each_row_of_a_batch_is_as_alone(case):
    """Padding neither counts nor is read, also in decoded tokens."""
    model, rows = case.model(), (zoo.TWO, zoo.ONE)
    with vlmprune.patch(model, "spatten", keep_ratio=0.5, heads=0.5, values=0.5) as handle:
        together = generated(model, case.inputs(rows), STEPS)
        kept = {layer: heads.tolist() for layer, heads in handle.last.heads.items()}
        for row, one in enumerate(rows):
            alone = generated(model, case.inputs((one,)), STEPS)
            assert {n: heads.tolist()[0] for n, heads in handle.last.heads.items()} == {
                n: heads[row] for n, heads in kept.items()
            }
            same = torch.equal(alone.sequences[0, -STEPS:], together.sequences[row, -STEPS:])
            assert same
            torch.testing.assert_close(
                logits_of(alone)[:, 0], logits_of(together)[:, row], rtol=1e-3, atol=1e-4
            )


def test_nothing_is_left_of_it_and_whole_shares_do_nothing():
    model, inputs = LLAVA.model(), LLAVA.inputs((zoo.TWO, zoo.ONE))
    dense = logits_of(generated(model, inputs, STEPS))
    before = snapshot(model)
    with vlmprune.patch(model, "spatten", keep_ratio=1.0, heads=0.5) as handle:
        assert not torch.allclose(logits_of(generated(model, inputs, STEPS))[0], dense[0])
        beams = generated(model, inputs, STEPS, num_beams=2)
        assert beams[CACHE]._pruned.heads[3].shape == (4, 2)
        handle.set("spatten", keep_ratio=1.0, values=0.5)
        assert not torch.allclose(logits_of(generated(model, inputs, STEPS))[0], dense[0])
        assert not handle.last.heads
        handle.set("spatten", keep_ratio=1.0)
        assert torch.equal(logits_of(generated(model, inputs, STEPS)), dense)
    assert differences(before, snapshot(model)) == []


def test_what_cannot_be_is_refused():
    model = LLAVA.model()
    with (
        vlmprune.patch(model, "spatten", keep_ratio=0.5, heads=0.5),
        pytest.raises(vlmprune.UnsupportedFeatureError, match="leave heads out"),
    ):
        generated(model, LLAVA.inputs(zoo.SINGLE), 2, use_cache=False)
    with (
        vlmprune.patch(model, "spatten", keep_ratio=0.5, values=0.5),
        pytest.raises(vlmprune.UnsupportedFeatureError, match="1 of the 3 rows"),
    ):
        model(**LLAVA.inputs(zoo.BATCH))
    gemma = zoo.CASES["gemma4"].model()
    with pytest.raises(vlmprune.UnsupportedModelError, match="heads"):
        vlmprune.patch(gemma, "spatten", keep_ratio=0.5, heads=0.5)
    for field in ("heads", "values"):
        with pytest.raises(vlmprune.MethodFieldError, match=rf"{field}=1.5 .*up to 1"):
            vlmprune.method("spatten", keep_ratio=0.5, **{field: 1.5})


def test_flops_count_heads_in_the_prompt_and_values_in_decoded_tokens():
    cost = model_cost(LLAVA.model())
    pairs = cost.layers[2].per_pair
    thinned = {2: Thinned(layer=2, heads=0.5, values=0.25)}
    assert cost.prefill([10] * 4) - cost.prefill([10] * 4, None, thinned) == 100 * pairs // 2
    assert cost.decode([9] * 4, 2) - cost.decode([9] * 4, 2, thinned) == 10 * pairs * 3 // 8

"""Analytic FLOPs equal torch's counter; averages and shares (published ones: test_published.py)."""

from __future__ import annotations

import inspect
import sys
from dataclasses import dataclass

import pytest
import torch
import vlmprune
from kit.zoo import BOTH_FAMILIES, CASES, OF_TESTS, Case, each
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import _disable_current_modes
from vlmprune.adapters.family import IMAGE
from vlmprune.adapters.registry import family_of
from vlmprune.eval.classify.counting import counting
from vlmprune.eval.measure.flops import (
    _windows,
    after_cuts,
    cache_entries,
    model_cost,
    visual_share,
)
from vlmprune.prune.budget import Budget, MethodCall
from vlmprune.prune.contract import CacheMethod, Decoder

ROW = (4, "B", 6)  # Qwen: 3 x 5 tokens in windows of 2 x 2, so some are smaller
TEXT = 10


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_the_counter_counts_fused_attention_as_its_two_products(kv_heads: int):
    query, key = torch.randn(2, 4, 7, 16), torch.randn(2, kv_heads, 9, 16)
    value = torch.randn(2, kv_heads, 9, 16)
    with counting() as fused, torch.inference_mode():
        scaled_dot_product_attention(query, key, value, enable_gqa=True)
    key, value = (x.repeat_interleave(4 // kv_heads, dim=1) for x in (key, value))
    with counting() as products, torch.inference_mode():
        (query @ key.mT).softmax(-1) @ value
    assert fused.get_total_flops() == products.get_total_flops() > 0


def of_states(model, tokens: int, monkeypatch) -> int:
    """FLOPs of layers that keep a state which torch's counter does not see: gated delta rules run
    step by step here, without products of matrices, each head's state (K, V) being read, corrected
    and asked. It sees some more of their convolutions, behind the last token."""
    rules = [m for m in model.modules() if hasattr(m, "head_k_dim")]
    for module in {sys.modules[type(rule).__module__] for rule in rules}:
        step_by_step = module.torch_recurrent_gated_delta_rule
        monkeypatch.setattr(module, "torch_chunk_gated_delta_rule", step_by_step)
    steps = sum(3 * 2 * m.num_v_heads * m.head_k_dim * m.head_v_dim for m in rules)
    convolutions = [m.weight for m in model.modules() if type(m) is torch.nn.Conv1d]
    behind = sum(2 * weight.numel() * (weight.shape[-1] - 1) for weight in convolutions)
    return steps * tokens - behind


def uncounted(function):
    def run(*args, **kwargs):
        with _disable_current_modes():
            return function(*args, **kwargs)

    return run


def without_resizing(model, monkeypatch) -> None:
    """Some models bring positions to a picture's size by products, or take means of patches."""
    parts = {type(part) for part in family_of(model).vision_tower.modules()}
    for name in ("resize_positional_embeddings", "_avg_pool_by_positions"):
        for part in (part for part in parts if hasattr(part, name)):
            static = isinstance(inspect.getattr_static(part, name), staticmethod)
            own = uncounted(getattr(part, name))
            monkeypatch.setattr(part, name, staticmethod(own) if static else own)


def analytic(case: Case, model, visual_per_layer, **options):
    extra = len(case.row_ids(ROW)) - TEXT - case.num_tokens("B")  # marks of pictures
    return model_cost(model).sample(
        pictures=family_of(model).pictures(family_of(model).call(IMAGE, case.inputs([ROW])))[0],
        visual_per_layer=visual_per_layer,
        text_tokens=TEXT + extra,
        **options,
    )


@each("attention", ["sdpa", "eager"])
def test_dense_prefill_equals_torch(case: Case, attention: str, monkeypatch):
    check_dense(case, attention, monkeypatch)


@pytest.mark.parametrize("name", ["SHARING", "EXPERTS"])
def test_dense_prefill_of_variants_equals_torch(name: str, monkeypatch):
    """Layers that only the last token passes, and inputs of each layer; experts beside the MLP."""
    check_dense(getattr(OF_TESTS["gemma4"], name), "sdpa", monkeypatch)


def check_dense(case: Case, attention: str, monkeypatch) -> None:
    model = case.model(attention)
    model.set_experts_implementation("eager")  # torch's counter does not know grouped products
    unseen = of_states(model, len(case.row_ids(ROW)), monkeypatch)
    without_resizing(model, monkeypatch)
    with counting() as counter, torch.inference_mode():
        model(**case.inputs([ROW]), logits_to_keep=1)
    depth = len(family_of(model).text_model.layers)
    flops = analytic(case, model, [case.num_tokens("B")] * depth)
    assert flops.first_token == counter.get_total_flops() + unseen
    parts = counter.get_flop_counts()
    name = type(model).__name__
    core, family = model.base_model, family_of(model)
    named = {id(module): f"{name}.model.{path}" for path, module in core.named_modules()}
    assert flops.prefill == sum(parts[named[id(family.text_model)]].values()) + unseen
    vision = flops.vision + (flops.projector if case.packed else 0)  # Qwen's merger is in its tower
    counted = sum(parts[named[id(family.vision_tower)]].values())
    for module in family.projectors if not case.packed else ():  # Ovis 2 has one there, too
        if any(module is part for part in family.vision_tower.modules()):
            counted -= sum(parts[named[id(module)]].values())
    assert vision == counted


@BOTH_FAMILIES
@pytest.mark.parametrize("name", ["grid", "fastv"])
def test_patched_prefill_equals_torch_but_for_the_probes(case: Case, name: str):
    model = case.model()
    with vlmprune.patch(model, name, keep_tokens=7) as handle:
        with counting() as counter, torch.inference_mode():
            model(**case.inputs([ROW]), logits_to_keep=1)
        (entering,) = handle.last.tokens_per_layer
    unread = len(family_of(model).unread_layers({}))
    expected = analytic(case, model, entering, unread_layers=unread).first_token
    # FastV reads one attention row: a q of one token, and its products with all keys.
    probe = counter.get_total_flops() - expected
    assert entering[-1] == 7
    assert probe == 0 if name == "grid" else 0 <= probe < 0.02 * expected


def test_decoding_equals_torch():
    case = CASES["llava-clip-mistral"]
    model = case.model()
    with counting() as counter, torch.inference_mode():
        model.generate(**case.inputs([ROW]), max_new_tokens=5, min_new_tokens=5, do_sample=False)
    flops = analytic(case, model, [case.num_tokens("B")] * 4, new_tokens=5)
    assert flops.decode > 0
    assert flops.first_token + flops.decode == counter.get_total_flops()


def test_several_images_and_none_add_up():
    case = CASES["llava-clip-llama"]
    model = case.model()
    cost = model_cost(model)
    n = case.num_tokens("B")
    with counting() as counter, torch.inference_mode():
        model(**case.inputs([(3, "A", 2, "B", 5)]), logits_to_keep=1)
    two = cost.sample(pictures=[case.grid("A")] * 2, visual_per_layer=[2 * n] * 4, text_tokens=10)
    assert two.first_token == counter.get_total_flops()
    none = cost.sample(pictures=[], visual_per_layer=[0] * 4, text_tokens=10)
    assert none.vision == none.projector == 0
    assert none.prefill == cost.prefill([10] * 4)


def test_windows_tile_the_grid():
    assert _windows((4, 6), 2) == [4] * 6
    assert sorted(_windows((5, 3), 2)) == [1, 2, 2, 2, 4, 4]
    assert _windows((3, 5), 0) == [15]


LLAMA_7B = Decoder(num_layers=32, hidden_size=4096, intermediate_size=11008)


def test_visual_share():
    assert visual_share([576] * 32, 576, LLAMA_7B) == 1
    assert visual_share([0] * 32, 0, LLAMA_7B) == 1
    quarter = visual_share([144] * 32, 576, LLAMA_7B)
    assert 0.23 < quarter < 0.25  # attention is quadratic


def test_a_cut_counts_for_the_layer_before_it_too():
    assert after_cuts([576, 576, 309, 309, 113]) == [576, 309, 309, 113, 113]
    assert after_cuts([20, 20]) == [20, 20]


@dataclass(frozen=True, kw_only=True)
class Evicting(CacheMethod):
    name = "evicting"

    def needs(self, shape):
        return ()


def test_decoding_with_fewer_entries_costs_less():
    case = CASES["llava-clip-llama"]
    model, n = case.model(), case.num_tokens("B")
    dense = analytic(case, model, [n] * 4, new_tokens=3)
    call = MethodCall(Evicting(), Budget("keep_tokens", 6))
    entries = cache_entries([vlmprune.method("grid", keep_tokens=4), call], [n], TEXT)
    assert entries == 6 + TEXT
    short = analytic(case, model, [n] * 4, new_tokens=3, cache_entries=entries)
    assert short.first_token == dense.first_token
    assert short.decode == analytic(case, model, [6] * 4, new_tokens=3).decode < dense.decode
    # What never entered a layer is not in its cache either.
    both = analytic(case, model, [n, n, 2, 2], new_tokens=3, cache_entries=entries)
    assert both.decode == analytic(case, model, [6, 6, 2, 2], new_tokens=3).decode
    assert cache_entries([MethodCall(Evicting(), None)], [n], TEXT) is None
    assert cache_entries([], [n], TEXT) is None

"""Flash attention: what transformers does around its kernels meets shortened prompts, gaps in the
positions and taps. The kernels themselves are `flash_kernels`; on a GPU, `test_cuda` has real ones.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import vlmprune
from kit import skips, zoo
from kit.decoding import call_of, generated, logits_of
from kit.flash_kernels import flash_attn_func, flash_attn_varlen_func, flash_kernels
from kit.precision import BY_STEP, METHODS, STEPS, check, patched, truth_for
from transformers import DynamicCache
from transformers import modeling_flash_attention_utils as utils
from vlmprune.adapters.cache_names import CACHE

BATCHES = {"padded": (zoo.TWO, zoo.ONE), "one": (zoo.TWO,)}
"""Alone and without padding, position ids with gaps look like those of packed sequences."""


@pytest.fixture
def kernels():
    with flash_kernels():
        yield


def model_of(case: zoo.Case):
    model = case.model()
    model.set_attn_implementation("flash_attention_2")
    return model


@zoo.turns("name", [*METHODS, BY_STEP], [zoo.CASES[name] for name in zoo.FAMILY_NAMES])
@pytest.mark.parametrize("batch", BATCHES)
def test_equals_the_oracle(kernels, case, name, batch):
    if zoo.options_for(case, name) is None:
        skips.skip("no signal", name)
    model, rows = model_of(case), BATCHES[batch]
    for positions in ("original", "repacked")[: 1 if case.fixed_positions else 2]:
        handle = patched(model, case, name, positions)
        out = generated(model, case.inputs(rows), STEPS)
        check(out, truth_for(case, rows, model, handle), torch.float32)


@pytest.mark.parametrize("case", [zoo.CASES["llava-clip-llama"]], ids=lambda case: case.name)
@pytest.mark.parametrize("name", [n for n in vlmprune.methods() if n not in zoo.WEIGHING])
def test_every_method_does_what_it_does_with_sdpa(kernels, case, name):
    if (options := zoo.options_for(case, name)) is None:
        skips.skip("no signal", name)
    found, rows = [], BATCHES["padded"]
    for model in (model_of(case), case.model()):
        fields = {word: value for word, value in options.items() if word != "clip"}
        call = call_of(name, **zoo.budget(name, keep_ratio=0.4))
        call = replace(call, method=replace(call.method, **fields))
        handle = vlmprune.patch(model, [call], clip=options.get("clip"))
        found.append((logits_of(generated(model, case.inputs(rows))), handle.last.kept))
    torch.testing.assert_close(found[0][0], found[1][0], atol=1e-4, rtol=1e-4)
    assert all(map(torch.equal, found[0][1], found[1][1]))


@zoo.FAMILIES
@pytest.mark.parametrize("name", ["divprune", "fastv"])
def test_static_caches(kernels, case, name):
    """Of their columns only the mask tells which are filled."""
    model = model_of(case)
    for rows in BATCHES.values():
        handle = patched(model, case, name)
        out = generated(model, case.inputs(rows), STEPS, cache_implementation="static")
        check(out, truth_for(case, rows, model, handle), torch.float32)


@zoo.FAMILIES
def test_a_full_budget_changes_no_bit(kernels, case):
    model = model_of(case)
    for rows in BATCHES.values():
        dense = logits_of(generated(model, case.inputs(rows), STEPS))
        expected = logits_of(generated(case.reference(), case.inputs(rows), STEPS))
        torch.testing.assert_close(dense, expected, atol=1e-4, rtol=1e-4)
        for name in (*METHODS, BY_STEP):
            if zoo.options_for(case, name) is not None:
                with patched(model, case, name, keep_ratio=1.0):
                    assert torch.equal(logits_of(generated(model, case.inputs(rows), STEPS)), dense)


@pytest.mark.parametrize("name", ["llava-clip-llama", "llava_onevision"])
@pytest.mark.parametrize("method", ["divprune", "fastv"])
@torch.no_grad()
def test_an_image_of_a_second_turn(kernels, name, method):
    """Its positions have gaps and start behind those of the first turn."""
    case, found = zoo.CASES[name], []
    for model in (case.model(), model_of(case)):
        vlmprune.patch(model, method, keep_ratio=0.4, positions="original")
        cache, length = DynamicCache(config=model.config.get_text_config()), 0
        for row in ((3, "A", 2), (4, "B", 3)):
            inputs = case.inputs([row])
            length += inputs["input_ids"].shape[1]
            inputs["attention_mask"] = torch.ones(1, length, dtype=torch.long)
            logits = model(**inputs, **{CACHE: cache}).logits
        found.append(logits)
    torch.testing.assert_close(*found, atol=1e-4, rtol=1e-4)


def test_the_kernels_are_those_that_run(kernels, monkeypatch):
    """Every layer of encoder and decoder, and in a decoding step."""
    runs = []

    def noted(kernel):
        return lambda *args, **kwargs: runs.append(kernel) or kernel(*args, **kwargs)

    monkeypatch.setattr(utils, "_flash_fn", noted(flash_attn_func))
    monkeypatch.setattr(utils, "_flash_varlen_fn", noted(flash_attn_varlen_func))
    case = zoo.CASES["qwen2_5_vl"]
    model = model_of(case)
    with patched(model, case, "fastv"):
        generated(model, case.inputs([zoo.ONE]), 2)
    encoder, decoder = len(model.model.visual.blocks), len(model.model.language_model.layers)
    assert runs == [flash_attn_varlen_func] * encoder + [flash_attn_func] * 2 * decoder


def test_the_kernels_against_those_of_pytorch():
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 7, heads, 8, generator=draw) for heads in (4, 2, 2))
    given = [x.transpose(1, 2) for x in (q, k, v)]
    expected = torch.nn.functional.scaled_dot_product_attention(
        *given, is_causal=True, enable_gqa=True
    ).transpose(1, 2)
    torch.testing.assert_close(flash_attn_func(q, k, v, causal=True), expected)
    last = flash_attn_func(q[:, -2:], k, v, causal=True)
    torch.testing.assert_close(last, expected[:, -2:])
    bounds = torch.tensor([0, 7, 14])
    packed = flash_attn_varlen_func(
        *(x.flatten(0, 1) for x in (q, k, v)), bounds, bounds, 7, 7, causal=True
    )
    torch.testing.assert_close(packed.view_as(expected), expected)
    window = flash_attn_func(q, k, v, causal=True, window_size=(0, 0))
    torch.testing.assert_close(window, v.repeat_interleave(2, 2))

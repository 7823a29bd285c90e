"""What only a GPU shows: half precision, flash attention, no waiting for the device. Run them with
`pytest -m cuda -n0` on a machine that has one; elsewhere they are skipped.

Expected values are those of the slow oracles in float32 on the CPU, for the tokens that the model
on the GPU reports as kept: which ones these are may depend on the precision, what becomes of them
may not.
"""

from __future__ import annotations

import functools
import itertools
import warnings
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import vlmprune
from kit import skips, zoo
from kit.decoding import generated, logits_of
from kit.drawn import NAMES, TILINGS, make_tokens
from kit.precision import (
    ALIKE,
    BY_STEP,
    METHODS,
    STEPS,
    check,
    distance,
    on_cpu,
    patched,
    truth_for,
)
from kit.snapshots import differences, snapshot
from transformers import DynamicCache
from vlmprune.adapters.cache_names import CACHE
from vlmprune.prune.contract import BeforeLLM
from vlmprune.prune.registry import method_class
from vlmprune.prune.select import select
from vlmprune.prune.tiling import Tiling

DEVICE = torch.device("cuda")
pytestmark = [
    pytest.mark.cuda,
    skips.needs("gpu"),
]
KERNELS = ("sdpa", "flash_attention_2")
FLASH = skips.needs("flash")
HALF = [(dtype, attention) for dtype in (torch.bfloat16, torch.float16) for attention in KERNELS]
WAYS = [(torch.float32, "sdpa"), *HALF]
CASES = list(zoo.CASES.values())
FAMILIES = [zoo.CASES[name] for name in zoo.FAMILY_NAMES]
ROWS = (zoo.TWO, zoo.ONE)
"""Prompts of different lengths, padded on the left."""


@pytest.fixture(autouse=True)
def all_of_float32(monkeypatch):
    """Convolutions, too, are computed in float32 where that is asked for."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def every(cases=CASES, methods=(*METHODS, BY_STEP), ways=WAYS):
    """Methods on all models that have what they read, in all ways to run these; one of them where
    there is no GPU, as to skip hundreds takes seconds too."""
    found = (
        pytest.param(
            *(case, name, dtype, attention),
            id=f"{case.name}-{name}-{str(dtype).removeprefix('torch.')}-{attention}",
            marks=FLASH if "flash" in attention else (),
        )
        for case, name, (dtype, attention) in itertools.product(cases, methods, ways)
        if zoo.options_for(case, name) is not None
    )
    few = itertools.islice(found, None if torch.cuda.is_available() else 1)
    return pytest.mark.parametrize(("case", "name", "dtype", "attention"), list(few))


def model_of(case: zoo.Case, dtype: torch.dtype, attention: str):
    """The model on the device, its rotary frequencies in float32 as when it is loaded."""
    model = case.model()
    for weight in model.parameters():
        weight.data = weight.data.to(dtype)
    model.to(DEVICE).set_attn_implementation(attention)
    return model


def inputs_of(case: zoo.Case, rows, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    given = case.inputs(rows).items()
    return {k: v.to(DEVICE, dtype if v.is_floating_point() else None) for k, v in given}


def waits(step: Callable[[], object]) -> list[str]:
    """Where the host waited for the device."""
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return [f"{w.filename}:{w.lineno}" for w in caught if "synchroniz" in str(w.message)]


# --- The same numbers --------------------------------------------------------------------------


@every(methods=METHODS)
def test_equals_the_oracle(case, name, dtype, attention):
    model = model_of(case, dtype, attention)
    words = ("original", "repacked")[: 1 if case.fixed_positions else 2]
    for positions, rows in itertools.product(words, (ROWS, (zoo.TWO,))):
        handle = patched(model, case, name, positions)
        out = generated(model, inputs_of(case, rows, dtype), STEPS)
        check(out, truth_for(case, rows, model, handle), dtype)
        if name not in zoo.ON_CACHE:
            assert handle.last.tokens_kept == [round(0.4 * n) for n in case.counts(rows)]


@every(methods=(BY_STEP,), ways=WAYS[:1])
def test_choosing_at_every_step_equals_the_oracle(case, name, dtype, attention):
    test_equals_the_oracle(case, name, dtype, attention)


@every(cases=FAMILIES)
def test_a_row_of_a_batch_is_the_row_alone(case, name, dtype, attention):
    """In float32 the same tokens are kept; in half precision, where images that are encoded
    together are rounded differently, nearly the same ones, and logits say something where all are.
    """
    model = model_of(case, dtype, attention)
    handle = patched(model, case, name)
    together = logits_of(generated(model, inputs_of(case, ROWS, dtype), STEPS))
    kept = list(handle.last.kept)
    for row, spec in enumerate(ROWS):
        alone = logits_of(generated(model, inputs_of(case, (spec,), dtype), STEPS))[:, 0]
        pairs = [(found, kept.pop(0)) for found in handle.last.kept]
        same = all(torch.equal(*pair) for pair in pairs)
        assert same or dtype != torch.float32
        assert all(torch.isin(*pair).float().mean() > 0.7 for pair in pairs)
        rounded = dtype != torch.float32 and name in ("sparsevlm", *zoo.ON_CACHE)
        if not same or rounded:  # which rows were merged, or entries read, is not compared
            continue
        for one, other in zip(alone, together[:, row], strict=True):
            assert distance(one[None], other[None].float().cpu()) < 2 * ALIKE[dtype]
            if one.argmax() != other.argmax():
                break  # nearly equal logits: from here on these are different texts


@every()
@torch.no_grad()
def test_a_full_budget_and_removal_change_no_bit(case, name, dtype, attention):
    model, inputs = model_of(case, dtype, attention), inputs_of(case, ROWS, dtype)
    prompt, steps = model(**inputs).logits, logits_of(generated(model, inputs, STEPS))
    before = snapshot(model)
    with patched(model, case, name, keep_ratio=1.0) as handle:
        assert torch.equal(model(**inputs).logits, prompt)
        assert torch.equal(logits_of(generated(model, inputs, STEPS)), steps)
        assert not handle.last.pruned
    with patched(model, case, name):
        assert not torch.equal(logits_of(generated(model, inputs, STEPS)), steps)
    assert not differences(before, snapshot(model))
    assert torch.equal(model(**inputs).logits, prompt)


@every(cases=FAMILIES, methods=("divprune", "fastv"), ways=HALF[:2])
@pytest.mark.parametrize("compiled", [False, True], ids=["as-it-is", "compiled"])
def test_static_caches(case, name, dtype, attention, compiled):
    model = model_of(case, dtype, attention)
    handle = patched(model, case, name)
    options = {"cache_implementation": "static", "disable_compile": not compiled}
    out = generated(model, inputs_of(case, ROWS, dtype), STEPS, **options)
    check(out, truth_for(case, ROWS, model, handle), dtype)


@zoo.FAMILIES
def test_remembered_images(case):
    model = model_of(case, torch.bfloat16, "sdpa")
    inputs = inputs_of(case, ROWS, torch.bfloat16)
    with vlmprune.patch(model, "divprune", keep_ratio=0.4) as handle:
        expected, kept = logits_of(generated(model, inputs)), handle.last.kept
    with vlmprune.patch(model, "divprune", keep_ratio=0.4, remember_images=4) as handle:
        for _ in range(2):
            assert torch.equal(logits_of(generated(model, inputs)), expected)
            assert all(map(torch.equal, handle.last.kept, kept))
        assert handle.remembered.misses == handle.remembered.hits == 3


# --- The same choice ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in NAMES if issubclass(method_class(n), BeforeLLM)])
def test_selections_are_those_of_the_cpu(name):
    method = method_class(name)()
    for tiling in (Tiling.single(24, 24), *TILINGS.values()):
        for seed, share in enumerate((0.1, 0.25, 0.6)):
            tokens = make_tokens(method, tiling, seed=seed)
            keep = tiling.num_newlines + max(1, round(share * tiling.num_patches))
            there = {signal: value.to(DEVICE) for signal, value in tokens.signals.items()}
            expected = select(method, tokens, keep)
            found = on_cpu(select(method, replace(tokens, signals=there), keep))
            for word in ("kept", "order", "rows", "groups"):
                one, other = getattr(found, word), getattr(expected, word)
                assert (one is None and other is None) or torch.equal(one, other), word
            if expected.features is not None:
                torch.testing.assert_close(found.features, expected.features, atol=1e-4, rtol=1e-4)


# --- No waiting --------------------------------------------------------------------------------


@every(cases=FAMILIES, ways=HALF[:2])
@pytest.mark.parametrize("rows", [(zoo.ONE,), ROWS], ids=["single", "padded"])
@torch.no_grad()
def test_decoding_waits_for_the_device_no_more_than_without_a_patch(
    case, name, dtype, attention, rows
):
    model, inputs = model_of(case, dtype, attention), inputs_of(case, rows, dtype)
    fields = zoo.options_for(case, name) | zoo.SMALL.get(name, {})

    def decode() -> list[str]:
        cache = DynamicCache(config=model.config.get_text_config())
        out = model(**inputs, **{CACHE: cache})
        token, mask = out.logits[:, -1:].argmax(-1), inputs["attention_mask"]
        found: list[str] = []
        for step in range(4):
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
            places = mask.sum(1, keepdim=True) - 1
            if case.fixed_positions:
                places = (places + model.model.rope_deltas).expand(3, -1, -1)
            step_inputs = {"input_ids": token, "attention_mask": mask, "position_ids": places}
            waited = waits(functools.partial(model, **step_inputs, **{CACHE: cache}))
            found += waited if step else []  # the first one makes what the others reuse
        return found

    dense = decode()
    with vlmprune.patch(model, name, keep_ratio=0.4, **fields):
        ours = decode()
    assert len(ours) <= len(dense), f"{ours} beside {dense}"

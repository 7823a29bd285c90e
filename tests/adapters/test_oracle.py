"""Every method on every model equals the slow and obvious computation of `oracle.Truth`."""

from __future__ import annotations

import functools

import pytest
import torch
import vlmprune
from kit import zoo
from kit.beside_oracle import (
    STEPS,
    budget_of,
    check_generated,
    check_kept,
    check_stored,
    generated,
    positions_of,
)
from kit.reported import TOLERANCE, truth_of
from vlmprune.adapters.cache_names import CACHE
from vlmprune.prune.budget import plan
from vlmprune.prune.registry import method_class
from vlmprune.prune.select import most

RUNS = {
    "sdpa-original": ("sdpa", {"keep_ratio": 0.4}, "original"),
    "sdpa-repacked": ("sdpa", {"keep_ratio": 0.4}, "repacked"),
    "eager-tokens": ("eager", {"keep_tokens": 17}, "original"),
}
ADAPTIVE = [
    name
    for name in vlmprune.methods()
    if name not in zoo.ON_CACHE + zoo.IN_ENCODER and not method_class(name).needs_budget
]
OF_EACH_KIND = ("divprune", "pool", "fastv", "sparsevlm")
"""They choose, merge, cut in the decoder, and both in the decoder."""
VIDEOS = [
    pytest.param(case, name, id=f"{name}-{case.name}")
    for case in zoo.CASES.values()
    if case.layout.takes_videos
    for name in zoo.asked(case, zoo.REMOVING if case.name in zoo.TWO_NAMES else OF_EACH_KIND)
]


def cut_layers(case: zoo.Case, rows, call) -> list[int]:
    """Where tokens of any image leave, each prompt of `rows` having one image at most."""
    plans = [plan(n, [call], case.shape) for n in case.counts(rows)]
    return sorted({stage.layer for stages in plans for stage in stages})


@pytest.mark.parametrize(
    ("case", "attention", "budget", "positions", "name"),
    [
        pytest.param(case, *given, name, id=f"{name}-{run}-{case.name}")
        for case in zoo.CASES.values()
        for run, given in RUNS.items()
        if run == "sdpa-original" or case.name in zoo.TWO_NAMES
        for name in zoo.asked(case, zoo.REMOVING)
    ],
)
def test_equals_the_oracle(case, attention, budget, positions, name):
    model = case.model(attention)
    call = vlmprune.method(name, **budget)
    if positions == "repacked" and case.fixed_positions:
        if not zoo.lacks_signal(case, call):
            with pytest.raises(vlmprune.MethodFieldError, match="original"):
                vlmprune.patch(model, name, positions=positions, **budget)
        return
    handle = zoo.patch_or_refusal(model, case, name, positions=positions, **budget)
    if handle is None:
        return
    alone = {}
    batches = (zoo.SINGLE, (zoo.TWO,), zoo.BATCH)
    for rows in batches if attention == "sdpa" else batches[2:]:
        inputs = case.inputs(rows)
        is_first = positions == "original" and case.name in zoo.TWO_NAMES
        goes_on = rows == zoo.BATCH or (rows == zoo.SINGLE and is_first)
        out = generated(model, inputs) if goes_on else model(**inputs)
        kept = check_kept(case, rows, handle, lambda n: budget_of(budget, n))
        for image, indices in zip(zoo.images(rows), kept, strict=True):
            assert torch.equal(alone.setdefault(image, indices), indices), "depends on the batch"
        if goes_on:
            assert positions_of(case, handle) == positions
            check_generated(truth_of(case, inputs, model, handle), out, inputs, handle)


@zoo.BOTH_FAMILIES
@zoo.METHODS
def test_default_positions_are_those_of_the_method(case, name):
    model = case.model()
    handle = zoo.patch_or_refusal(model, case, name, keep_ratio=0.4)
    if handle is None:
        return
    inputs = case.inputs(zoo.SINGLE)
    first = model(**inputs)
    call = vlmprune.method(name, keep_ratio=0.4)
    expected = "original" if case.fixed_positions else call.method.positions
    assert handle.last.positions == expected
    assert [stage.layer for stage in handle.last.stages] == cut_layers(case, zoo.SINGLE, call)
    assert {stage.positions for stage in handle.last.stages} == {expected}
    truth = truth_of(case, inputs, model, handle)
    torch.testing.assert_close(first.logits[0], truth.full_logits(0), **TOLERANCE)
    check_stored(truth, first[CACHE])


@pytest.mark.parametrize(
    ("case", "name"),
    [
        pytest.param(case, name, id=f"{name}-{case.name}")
        for case, name in zoo.by_turns(zoo.WHOLE_CASES, ADAPTIVE, (*zoo.TWO_NAMES, "llava_next"))
    ],
)
def test_methods_that_need_no_budget_equal_the_oracle(case, name):
    model = case.model()
    handle = zoo.patch_or_refusal(model, case, name)
    if handle is None:
        return
    method = handle.methods[0].method
    for rows in (zoo.SINGLE, zoo.BATCH) if case.name in zoo.TWO_NAMES else (zoo.BATCH,):
        inputs = case.inputs(rows)
        out = generated(model, inputs)
        found = iter(handle.last.tokens_kept)
        check_kept(case, rows, handle, lambda _, found=found: next(found))
        for tiling, count in zip(case.tilings(rows), handle.last.tokens_kept, strict=True):
            assert 0 <= count <= most(method, tiling)
        check_generated(truth_of(case, inputs, model, handle), out, inputs, handle)


@pytest.mark.parametrize(("case", "name"), VIDEOS)
def test_videos_equal_the_oracle(case, name):
    model = case.model()
    handle = zoo.patch_or_refusal(model, case, name, keep_ratio=0.4)
    if handle is None:
        return
    inputs = case.inputs(case.layout.videos)
    out = generated(model, inputs)
    check_kept(case, case.layout.videos, handle, lambda n: budget_of({"keep_ratio": 0.4}, n))
    check_generated(truth_of(case, inputs, model, handle), out, inputs, handle)


@zoo.BOTH_FAMILIES
@zoo.METHODS
def test_text_only_rows_do_not_change(case, name):
    model = case.model()
    if zoo.patch_or_refusal(model, case, name, keep_ratio=0.25) is None:
        return
    tokens, logits = text_alone(case)
    out = model.generate(
        **case.inputs(zoo.BATCH),
        max_new_tokens=STEPS,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    torch.testing.assert_close(torch.stack(out.logits)[:, 2], logits, **TOLERANCE)
    assert torch.equal(out.sequences[2, -STEPS:], tokens)
    for rows in ((zoo.NONE,), zoo.BATCH):
        found = model(**case.inputs(rows)).logits[-1, -9:]
        torch.testing.assert_close(found, text_logits(case), **TOLERANCE)


@functools.cache
def text_alone(case: zoo.Case) -> tuple[torch.Tensor, torch.Tensor]:
    """Greedy tokens and their logits after a prompt without images, unpatched."""
    out = case.reference().generate(
        **case.inputs((zoo.NONE,)),
        max_new_tokens=STEPS,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return out.sequences[0, -STEPS:], torch.stack(out.logits)[:, 0]


@functools.cache
def text_logits(case: zoo.Case) -> torch.Tensor:
    with torch.no_grad():
        return case.reference()(**case.inputs((zoo.NONE,))).logits[0]

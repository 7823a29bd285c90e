"""A full budget changes nothing: the same bits as the unpatched model."""

from __future__ import annotations

import functools

import pytest
import torch
import vlmprune
from kit import zoo
from kit.decoder_kinds import stored_lengths
from vlmprune.adapters.cache_names import CACHE


def layouts(case: zoo.Case, attention: str) -> list[tuple[zoo.Row, ...]]:
    """All on a family of each kind of positions; on others the one that holds most. The last one
    is generated on, too."""
    rows = [zoo.SINGLE, zoo.BATCH, *([case.layout.videos] if case.layout.takes_videos else [])]
    if attention != "sdpa":
        return [zoo.BATCH]
    return rows if case.name in zoo.TWO_NAMES else rows[-1:]


@functools.cache
def dense(case: zoo.Case, attention: str, rows, goes_on: bool = True):
    """Logits, tokens and logits of every step of the unpatched model."""
    return run(case.reference(attention), case.inputs(rows), goes_on)


def run(model, inputs, goes_on: bool = True):
    with torch.no_grad():
        prompt = model(**inputs)
    logits = prompt.logits
    if not goes_on:
        return logits, inputs["input_ids"], logits, stored_lengths(prompt[CACHE])
    out = model.generate(
        **inputs,
        max_new_tokens=2,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return logits, out.sequences, torch.stack(out.logits), stored_lengths(out[CACHE])


@pytest.mark.parametrize(
    ("case", "attention", "budget", "name"),
    [
        pytest.param(case, attention, budget, name, id=f"{name}-{attention}-{case.name}")
        for case in zoo.CASES.values()
        for attention, budget in (("sdpa", {"keep_ratio": 1.0}), ("eager", {"keep_tokens": 10**6}))
        if attention == "sdpa" or case.name in zoo.TWO_NAMES
        for name in zoo.asked(case, zoo.REMOVING)
    ],
)
def test_keeping_everything_is_the_unpatched_model_bit_for_bit(case, attention, budget, name):
    model = case.model(attention)
    handle = zoo.patch_or_refusal(model, case, name, **budget)
    if handle is None:
        return
    every = layouts(case, attention)
    for rows in every:
        goes_on = rows == every[-1]
        found = run(model, case.inputs(rows), goes_on)
        expected = dense(case, attention, rows, goes_on)
        assert torch.equal(found[0], expected[0])
        assert torch.equal(found[1], expected[1])
        assert torch.equal(found[2], expected[2])
        assert found[3] == expected[3]
        for indices, count in zip(handle.last.kept, case.counts(rows), strict=True):
            assert torch.equal(indices, torch.arange(count))
        assert handle.last.tokens_kept == case.counts(rows)
        assert handle.last.pruned is False


@pytest.mark.parametrize(
    ("case", "keep"),
    [(zoo.CASES["qwen2_5_vl"], 16), (zoo.CASES["llava_next"], 100)],
    ids=["qwen2_5_vl", "llava_next"],
)
@zoo.METHODS
def test_an_image_within_its_budget_is_left_alone_beside_one_that_is_not(case, keep, name):
    model, rows = case.model(), ((4, "D", 3), (7, "B", 3))
    large, small = case.counts(rows)
    assert large > keep > small
    if (handle := zoo.patch_or_refusal(model, case, name, keep_tokens=keep)) is None:
        return
    together = model(**case.inputs(rows)).logits[1, -1]
    late = any(cut.adaptive for cut in handle.methods[0].method.cuts(case.shape))
    assert handle.last.tokens_kept in ([keep, small], *([[0, small]] if late else []))
    assert torch.equal(handle.last.kept[1], torch.arange(small))
    assert handle.last.order[1] is None and handle.last.groups[1] is None
    alone = case.reference()(**case.inputs(rows[1:])).logits[0, -1]
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)


@zoo.ALL
def test_text_alone_is_the_unpatched_model_bit_for_bit(case):
    model = case.model()
    vlmprune.patch(
        model,
        [
            vlmprune.method("divprune", keep_ratio=0.5),
            vlmprune.method("fastv", keep_ratio=0.25),
        ],
    )
    rows = (zoo.NONE, (4,))
    found, expected = run(model, case.inputs(rows)), run(case.reference(), case.inputs(rows))
    assert all(torch.equal(a, b) for a, b in zip(found[:3], expected[:3], strict=True))
    assert found[3] == expected[3]

"""Methods before the LLM and in the decoder compose, each cutting what the one before it left: on
unusual prompts, with gaps in the positions, in sliding windows."""

from __future__ import annotations

import itertools

import pytest
import torch
import vlmprune
from kit import zoo
from kit.beside_oracle import STEPS, check_against, check_kept, positions_of
from kit.oracle import Truth
from kit.reported import TOLERANCE


@zoo.each("attention", ["sdpa", "eager"])
def test_methods_at_different_places_compose(case, attention):
    first = vlmprune.method("divprune", keep_ratio=0.5)
    second = vlmprune.method("fastv", keep_ratio=0.25, layer=2)
    for rows in (zoo.SINGLE, zoo.BATCH):
        inputs = case.inputs(rows)
        model = case.model(attention)
        with vlmprune.patch(model, first.name, keep_ratio=0.5) as handle:
            model(**inputs)
            before = handle.last.kept
        handle = vlmprune.patch(model, [first, second])
        model(**inputs)
        kept = check_kept(case, rows, handle, lambda n: max(1, round(0.25 * n)))
        for outer, inner in zip(before, kept, strict=True):
            assert torch.isin(inner, outer).all()
        positions = positions_of(case, handle)
        truth = Truth(case.reference("eager"), inputs, [(0, before), (2, kept)], positions)
        check_against(truth, model, inputs, handle)


@zoo.WHOLE
@pytest.mark.parametrize("order", [("fastv", "divprune"), ("divprune", "fastv")], ids="-".join)
def test_the_order_in_the_list_is_the_order_of_depth(case, order):
    options = {"fastv": {"keep_ratio": 0.25, "layer": 2}, "divprune": {"keep_ratio": 0.5}}
    model = case.model()
    handle = vlmprune.patch(model, [vlmprune.method(name, **options[name]) for name in order])
    model(**case.inputs(zoo.SINGLE))
    n = case.num_tokens("C")
    half, quarter = round(n / 2), round(n / 4)
    assert list(handle.last.tokens_per_layer[0]) == [half, half, quarter, quarter]


@zoo.WHOLE
@pytest.mark.parametrize("layer", [1, 2, 3])
def test_a_decoder_method_keeps_the_best_of_its_attention_row(case, layer):
    model, inputs = case.model(), case.inputs(zoo.BATCH)
    handle = vlmprune.patch(model, "fastv", keep_ratio=0.3, layer=layer)
    model(**inputs)
    truth = Truth(case.reference("eager"), inputs)
    rows = [image for b in range(len(zoo.BATCH)) for image in truth.last_row(b, layer - 1)]
    for kept, scores in zip(handle.last.kept, rows, strict=True):
        best = scores.topk(len(kept)).indices.sort().values
        assert torch.equal(kept, best)
    check_against(
        Truth(case.reference("eager"), inputs, [(layer, handle.last.kept)]), model, inputs, handle
    )


UNUSUAL = {
    "image-first": (("C", 4),),
    "adjacent-images": (("A", "B", 3),),
    "twice-the-same": ((2, "A", "A", 3), (3, "C", 1)),
    "long-text-beside": ((1, "B", 1), (40,), ("A", 2, "B", 1, "C", 2)),
    "image-last": ((2, "A"), (5, "C")),
    "as-long-but-two-images": ((43, "A", 3), (3, "A", 4, "B", 3)),
}


@zoo.turns("how", itertools.product(UNUSUAL, ["before", "decoder", "both"]))
def test_unusual_prompts(case, how):
    rows, which = UNUSUAL[how[0]], how[1]
    calls = {
        "before": [vlmprune.method("divprune", keep_tokens=5)],
        "decoder": [vlmprune.method("fastv", keep_tokens=3, layer=1)],
        "both": [
            vlmprune.method("random", keep_tokens=9),
            vlmprune.method("fastv", keep_tokens=1, layer=3),
        ],
    }[which]
    model, inputs = case.model(), case.inputs(rows)
    handle = vlmprune.patch(model, calls)
    model(**inputs)
    cuts = [(stage.layer, stage.kept) for stage in handle.last.stages]
    assert [layer for layer, _ in cuts] == [call.method.cuts(case.shape)[0].layer for call in calls]
    truth = Truth(case.reference("eager"), inputs, cuts, handle.last.positions)
    check_against(truth, model, inputs, handle)


@zoo.each(("attention", "name"), itertools.product(["sdpa", "eager"], ["divprune", "fastv"]))
def test_gaps_in_the_positions_are_not_taken_for_packed_sequences(case, attention, name):
    """Without mask and cache, transformers reads a jump of the positions as a new sequence."""
    model, inputs = case.model(attention), case.inputs(zoo.SINGLE)
    handle = vlmprune.patch(model, name, keep_ratio=0.4, positions="original")
    del inputs["attention_mask"]
    first = model(**inputs, use_cache=False)
    truth = Truth(
        case.reference("eager"),
        inputs,
        [(stage.layer, stage.kept) for stage in handle.last.stages],
    )
    tokens, logits = truth.decode(STEPS)
    torch.testing.assert_close(first.logits[:, -1], logits[0], **TOLERANCE)
    options = {"return_dict_in_generate": True, "output_logits": True, "do_sample": False}
    out = model.generate(**inputs, use_cache=False, max_new_tokens=STEPS, **options)
    torch.testing.assert_close(torch.stack(out.logits), logits, **TOLERANCE)
    assert torch.equal(out.sequences[:, -STEPS:], tokens)


@pytest.mark.parametrize("which", ["before", "decoder", "both"])
@pytest.mark.parametrize("rows", [zoo.SINGLE, zoo.BATCH], ids=["single", "batch"])
def test_sliding_windows_count_the_tokens_that_are_left(which, rows):
    case = zoo.SLIDING
    calls = {
        "before": [vlmprune.method("divprune", keep_ratio=0.8)],
        "decoder": [vlmprune.method("fastv", keep_ratio=0.6, layer=2)],
        "both": [
            vlmprune.method("divprune", keep_ratio=0.8),
            vlmprune.method("fastv", keep_ratio=0.6, layer=2),
        ],
    }[which]
    model, inputs = case.model(), case.inputs(rows)
    plain = Truth(case.reference("eager"), inputs, by_layer=True)
    torch.testing.assert_close(
        model(**inputs).logits[:, -1], plain.decode(1)[1][0], **TOLERANCE, msg="the oracle itself"
    )
    handle = vlmprune.patch(model, calls)
    try:
        model(**inputs)
    except vlmprune.UnsupportedFeatureError as refused:
        assert "sliding" in str(refused)
        return
    cuts = [(stage.layer, stage.kept) for stage in handle.last.stages]
    truth = Truth(case.reference("eager"), inputs, cuts, handle.last.positions)
    tokens, logits = truth.decode(STEPS)
    options = {"return_dict_in_generate": True, "output_logits": True, "do_sample": False}
    out = model.generate(**inputs, max_new_tokens=STEPS, **options)
    torch.testing.assert_close(torch.stack(out.logits), logits, **TOLERANCE)
    assert torch.equal(out.sequences[:, -STEPS:], tokens)

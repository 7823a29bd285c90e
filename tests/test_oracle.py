"""Every method on every model equals the slow and obvious computation of `oracle.Truth`."""

from __future__ import annotations

import pytest
import torch
import vlmprune
import zoo
from oracle import Truth
from PIL import Image
from vlmprune.prune.contract import Place

STEPS = 4
TOLERANCE = {"atol": 1e-4, "rtol": 1e-4}
"""Peaky random weights amplify rounding: the two orders of operations differ by about 1e-5."""

RUNS = pytest.mark.parametrize(
    ("attention", "budget"),
    [("sdpa", {"keep_ratio": 0.4}), ("eager", {"keep_tokens": 17})],
    ids=["sdpa-ratio", "eager-tokens"],
)


def positions_of(case: zoo.Case, handle) -> str:
    assert handle.last.positions in ("original", "repacked")
    if case.fixed_positions:
        assert handle.last.positions == "original"
    return handle.last.positions


def cut_layers(case: zoo.Case, call) -> list[int]:
    return [cut.layer for cut in call.method.cuts(case.shape)]


def check_kept(case: zoo.Case, rows, handle, expected) -> list[torch.Tensor]:
    """The kept indices are well formed and as many as the budget says."""
    kept = handle.last.kept
    names = zoo.images(rows)
    assert len(kept) == len(names)
    for indices, name in zip(kept, names, strict=True):
        assert indices.dtype == torch.int64
        assert len(indices) == expected(case.num_tokens(name))
        assert torch.equal(indices, indices.unique())
        assert int(indices.min()) >= 0 and int(indices.max()) < case.num_tokens(name)
    assert list(handle.last.tokens_in) == [case.num_tokens(name) for name in names]
    return kept


def check_against(truth: Truth, model, inputs, handle=None) -> None:
    """First-step logits, greedy tokens, logits of every step, and the length of the cache."""
    tokens, logits = truth.decode(STEPS)
    with torch.no_grad():
        first = model(**inputs)
    assert first.logits.shape[:2] == inputs["input_ids"].shape
    torch.testing.assert_close(first.logits[:, -1], logits[0], **TOLERANCE)

    lengths = [truth.layer_lengths(b) for b in range(len(truth.rows))]
    physical = [layer.keys.shape[-2] for layer in first.past_key_values.layers]
    assert physical == [max(column) for column in zip(*lengths, strict=True)]
    if handle is not None:
        text = [int((ids != zoo.IMAGE).sum()) for ids in (row.ids for row in truth.rows)]
        visual = [[n - t for n in row] for row, t in zip(lengths, text, strict=True)]
        assert [list(row) for row in handle.last.tokens_per_layer] == visual
        assert list(handle.last.text_tokens) == text

    out = model.generate(
        **inputs,
        max_new_tokens=STEPS,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    torch.testing.assert_close(torch.stack(out.logits), logits, **TOLERANCE)
    assert torch.equal(out.sequences[:, -STEPS:], tokens)
    assert torch.equal(out.sequences[:, :-STEPS], inputs["input_ids"])
    cache = out.past_key_values
    physical = [layer.keys.shape[-2] for layer in cache.layers]
    assert physical == [max(column) + STEPS - 1 for column in zip(*lengths, strict=True)]
    assert cache.get_seq_length() == inputs["input_ids"].shape[1] + STEPS - 1


# --- the oracle itself -------------------------------------------------------------------------


@zoo.ALL
@pytest.mark.parametrize("by_layer", [False, True], ids=["language-model", "layer-loop"])
def test_the_oracle_without_cuts_is_the_unpatched_model(case, by_layer):
    model, inputs = case.reference("sdpa"), case.inputs(zoo.BATCH)
    check_against(Truth(case.reference("eager"), inputs, by_layer=by_layer), model, inputs)


@zoo.ALL
@pytest.mark.parametrize("positions", ["original", "repacked"])
def test_the_two_ways_of_the_oracle_agree_and_a_cut_matters(case, positions):
    model, inputs = case.reference("eager"), case.inputs(zoo.BATCH)
    kept = [torch.arange(0, case.num_tokens(name), 3) for name in zoo.images(zoo.BATCH)]
    one = Truth(model, inputs, [(0, kept)], positions)
    two = Truth(model, inputs, [(0, kept)], positions, by_layer=True)
    deep = Truth(model, inputs, [(2, kept)])
    dense = Truth(model, inputs)
    for row in range(len(zoo.BATCH)):
        torch.testing.assert_close(
            one.next_logits(row, [5]), two.next_logits(row, [5]), **TOLERANCE
        )
        moved = [
            (t.next_logits(row)[-1] - dense.next_logits(row)[-1]).abs().max() for t in (one, deep)
        ]
        assert min(moved) > 0.3 if zoo.images([zoo.BATCH[row]]) else max(moved) < 1e-4
    if not case.fixed_positions:
        other = Truth(
            model, inputs, [(0, kept)], "repacked" if positions == "original" else "original"
        )
        assert (one.next_logits(0) - other.next_logits(0)).abs().max() > 0.1


@zoo.ALL
def test_the_oracle_reads_the_attention_row_that_eager_attention_has(case):
    model, inputs = case.reference("eager"), case.inputs(zoo.BATCH)
    maps = model(**inputs, output_attentions=True).attentions
    truth = Truth(model, inputs)
    for row, spec in enumerate(truth.rows):
        for layer, attention in enumerate(maps):
            for image, found in zip(spec.images, truth.last_row(row, layer), strict=True):
                expected = attention[row].mean(0)[-1, spec.columns[image]]
                torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-3)


# --- the methods -------------------------------------------------------------------------------


@zoo.ALL
@RUNS
@pytest.mark.parametrize("positions", ["original", "repacked"])
@zoo.METHODS
def test_equals_the_oracle(case, attention, budget, name, positions):
    model = case.model(attention)
    call = vlmprune.method(name, **budget)
    inside = call.method.place is Place.DECODER
    if positions == "repacked" and (inside or case.fixed_positions):
        if not zoo.lacks_signal(case, call):
            with pytest.raises(vlmprune.MethodFieldError, match="original"):
                vlmprune.patch(model, name, positions=positions, **budget)
        return
    handle = zoo.patch_or_refusal(model, case, name, positions=positions, **budget)
    if handle is None:
        return
    (layer,) = cut_layers(case, call)

    def count(tokens: int) -> int:
        return min(tokens, budget.get("keep_tokens", max(1, round(0.4 * tokens))))

    alone = {}
    for rows in (zoo.SINGLE, (zoo.TWO,), zoo.BATCH):
        inputs = case.inputs(rows)
        model(**inputs)
        kept = check_kept(case, rows, handle, count)
        for image, indices in zip(zoo.images(rows), kept, strict=True):
            assert torch.equal(alone.setdefault(image, indices), indices), "depends on the batch"
        if rows != (zoo.TWO,):
            assert positions_of(case, handle) == positions
            truth = Truth(case.reference("eager"), inputs, [(layer, kept)], positions)
            check_against(truth, model, inputs, handle)


@zoo.ALL
@zoo.METHODS
def test_default_positions_are_those_of_the_method(case, name):
    model = case.model()
    handle = zoo.patch_or_refusal(model, case, name, keep_ratio=0.4)
    if handle is None:
        return
    inputs = case.inputs(zoo.SINGLE)
    model(**inputs)
    call = vlmprune.method(name, keep_ratio=0.4)
    expected = "original" if case.fixed_positions else call.method.positions
    assert handle.last.positions == expected
    truth = Truth(
        case.reference("eager"), inputs, [(cut_layers(case, call)[0], handle.last.kept)], expected
    )
    check_against(truth, model, inputs, handle)


@zoo.ALL
@zoo.METHODS
def test_text_only_rows_do_not_change(case, name):
    model = case.model()
    if zoo.patch_or_refusal(model, case, name, keep_ratio=0.25) is None:
        return
    for rows, row in (((zoo.NONE,), 0), (zoo.BATCH, 2)):
        inputs = case.inputs(rows)
        logits = model(**inputs).logits[row, -9:]
        reference = case.reference()(**inputs).logits[row, -9:]
        torch.testing.assert_close(logits, reference, **TOLERANCE)
        tokens = model.generate(**inputs, max_new_tokens=STEPS, do_sample=False)
        expected = case.reference().generate(**inputs, max_new_tokens=STEPS, do_sample=False)
        assert torch.equal(tokens[row], expected[row])


@zoo.ALL
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
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


@zoo.ALL
@pytest.mark.parametrize("order", [("fastv", "divprune"), ("divprune", "fastv")], ids="-".join)
def test_the_order_in_the_list_is_the_order_of_depth(case, order):
    options = {"fastv": {"keep_ratio": 0.25, "layer": 2}, "divprune": {"keep_ratio": 0.5}}
    model = case.model()
    handle = vlmprune.patch(model, [vlmprune.method(name, **options[name]) for name in order])
    model(**case.inputs(zoo.SINGLE))
    n = case.num_tokens("C")
    half, quarter = round(n / 2), round(n / 4)
    assert list(handle.last.tokens_per_layer[0]) == [half, half, quarter, quarter]


@zoo.ALL
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


@zoo.ALL
@pytest.mark.parametrize("which", ["before", "decoder", "both"])
@pytest.mark.parametrize(
    "rows",
    [
        (("C", 4),),
        (("A", "B", 3),),
        ((2, "A", "A", 3), (3, "C", 1)),
        ((1, "B", 1), (40,), ("A", 2, "B", 1, "C", 2)),
        ((2, "A"), (5, "C")),
    ],
    ids=["image-first", "adjacent-images", "twice-the-same", "long-text-beside", "image-last"],
)
def test_unusual_prompts(case, which, rows):
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
    assert [layer for layer, _ in cuts] == [cut_layers(case, call)[0] for call in calls]
    truth = Truth(case.reference("eager"), inputs, cuts, handle.last.positions)
    check_against(truth, model, inputs, handle)


@zoo.ALL
@zoo.ATTENTION
@pytest.mark.parametrize("name", ["divprune", "fastv"])
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


@zoo.ALL
def test_budgets_that_count_cost_give_what_they_promise(case):
    n = case.num_tokens("C")
    for name, layer in (("divprune", 0), ("fastv", 2)):
        model = case.model()
        handle = vlmprune.patch(model, name, average_tokens=0.75 * n)
        model(**case.inputs(zoo.SINGLE))
        layers = handle.last.tokens_per_layer[0]
        assert list(layers) == [n] * layer + [len(handle.last.kept[0])] * (4 - layer)
        assert abs(sum(layers) / 4 - 0.75 * n) <= 0.5
    handle = vlmprune.patch(model, "divprune", flops_ratio=0.5)
    model(**case.inputs(zoo.SINGLE))
    assert abs(len(handle.last.kept[0]) - n / 2) <= 1  # attention's square is small here


@zoo.ALL
def test_the_handle_describes_the_last_prefill_that_saw_images(case):
    model = case.model()
    handle = vlmprune.patch(model, "divprune", keep_ratio=0.4)
    inputs = case.inputs(zoo.BATCH)
    model(**inputs)
    prefill = [k.clone() for k in handle.last.kept]
    model.generate(**inputs, max_new_tokens=3, do_sample=False, num_beams=2)
    assert len(handle.last.kept) == len(prefill), "beams are not expanded"
    assert all(map(torch.equal, handle.last.kept, prefill))
    assert len(handle.last.tokens_per_layer) == len(zoo.BATCH)
    assert handle.last.pruned is True
    assert handle.last.select_seconds >= 0
    model(**case.inputs((zoo.NONE,)))
    assert all(map(torch.equal, handle.last.kept, prefill)), "a text-only call overwrote it"


@zoo.BOTH_FAMILIES
def test_the_overlay_shows_what_was_kept(case):
    model = case.model()
    handle = vlmprune.patch(model, "divprune", keep_ratio=0.4)
    with pytest.raises(Exception, match="run"):
        handle.overlay(Image.new("RGB", (60, 60)))
    model(**case.inputs(zoo.BATCH))
    for index, name in enumerate(zoo.images(zoo.BATCH)):
        rows, columns = case.grid(name)
        colour = (250, 200, 150)
        picture = Image.new("RGB", (columns * 20, rows * 20), colour)
        shown = handle.overlay(picture, index=index)
        assert picture.getcolors() == [(columns * rows * 400, colour)], "the caller's was changed"
        height, width = shown.height / rows, shown.width / columns
        kept = set(handle.last.kept[index].tolist())
        for token in range(rows * columns):
            row, column = divmod(token, columns)
            middle = shown.getpixel((int((column + 0.5) * width), int((row + 0.5) * height)))
            assert (middle == colour) == (token in kept), (index, token)
    with pytest.raises(IndexError, match="3"):
        handle.overlay(picture, index=3)

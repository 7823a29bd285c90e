"""Every method on every model equals the slow and obvious computation of `oracle.Truth`."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import ClassVar

import pytest
import torch
import vlmprune
from kit import zoo
from kit.oracle import Truth
from kit.reported import TOLERANCE, features_of, rows_that_enter, truth_of
from PIL import Image
from vlmprune.prune.budget import Budget, MethodCall, plan
from vlmprune.prune.contract import (
    BeforeLLM,
    EncoderFeatures,
    Features,
    Place,
    Scope,
    Selection,
    Signal,
)
from vlmprune.prune.registry import method_class
from vlmprune.prune.select import most
from vlmprune.prune.tiling import Tiling

STEPS = 4
RUNS = {
    "sdpa-original": ("sdpa", {"keep_ratio": 0.4}, "original"),
    "sdpa-repacked": ("sdpa", {"keep_ratio": 0.4}, "repacked"),
    "eager-tokens": ("eager", {"keep_tokens": 17}, "original"),
}
ADAPTIVE = [
    name
    for name in vlmprune.methods()
    if name not in zoo.ON_CACHE and not method_class(name).needs_budget
]
VIDEO = pytest.mark.parametrize(
    "case", [c for c in zoo.CASES.values() if c.layout.takes_videos], ids=lambda case: case.name
)


def positions_of(case: zoo.Case, handle) -> str:
    assert handle.last.positions in ("original", "repacked")
    if case.fixed_positions:
        assert handle.last.positions == "original"
    return handle.last.positions


def cut_layers(case: zoo.Case, rows, call) -> list[int]:
    """Where tokens of any image leave, each prompt of `rows` having one image at most."""
    plans = [plan(n, [call], case.shape) for n in case.counts(rows)]
    return sorted({stage.layer for stages in plans for stage in stages})


def cut_images(call) -> set[str]:
    """Which images the cuts are for, one by one or pooled; and whether they may remove all."""
    cuts = call.method.cuts(zoo.CLIP)
    return {cut.images for cut in cuts} | ({"adaptive"} if any(c.adaptive for c in cuts) else set())


def budget_of(budget: dict, tokens: int) -> int:
    """How many of an image's tokens a budget keeps."""
    if "keep_tokens" in budget:
        return min(tokens, budget["keep_tokens"])
    return max(1, round(budget["keep_ratio"] * tokens))


def check_kept(case: zoo.Case, rows, handle, expected) -> list[torch.Tensor]:
    """The kept tokens are well formed, and the rows that enter as many as the budget says."""
    last, tilings = handle.last, case.tilings(rows)
    roles = set().union(*(cut_images(call) for call in handle.methods))
    assert list(last.tilings) == tilings
    assert list(last.tokens_in) == [tiling.num_tokens for tiling in tilings]
    assert len(last.kept) == len(tilings)
    wanted = [expected(tiling.num_tokens) for tiling in tilings]
    if "context" in roles:  # counts of pooled images are exact together
        assert _per_sample(last, last.tokens_kept) == _per_sample(last, wanted)
    else:
        allowed = [(count, 0) if "adaptive" in roles else (count,) for count in wanted]
        assert all(n in counts for n, counts in zip(last.tokens_kept, allowed, strict=True))
    everything = zip(last.kept, last.tokens_kept, last.order, last.groups, tilings, strict=True)
    for kept, count, order, groups, tiling in everything:
        assert kept.dtype == torch.int64
        assert torch.equal(kept, kept.unique())
        assert not len(kept) or (kept[0] >= 0 and kept[-1] < tiling.num_tokens)
        if order is None:
            assert len(kept) == count
        else:
            assert order.dtype == torch.int64 and len(order) == count
            assert torch.equal(order[order >= 0].sort().values, kept)
        if groups is not None:
            inside = all(call.method.place is Place.DECODER for call in handle.methods)
            check_groups(groups, order if order is not None else kept, tiling, newlines=inside)
    return last.kept


def _per_sample(last, counts: list[int]) -> dict[int, int]:
    sums: dict[int, int] = {}
    for sample, count in zip(last.image_sample, counts, strict=True):
        sums[sample] = sums.get(sample, 0) + count
    return sums


def check_groups(
    groups: list[torch.Tensor], rows: torch.Tensor, tiling: Tiling, *, newlines: bool
) -> None:
    """A list of members for each row, its own token among them."""
    assert len(groups) == len(rows)
    patches = tiling.patches(torch.device("cpu"))
    if newlines:  # inside the LLM they are tokens like any other
        patches = torch.arange(tiling.num_tokens)
    for members, row in zip(groups, rows.tolist(), strict=True):
        assert len(members) == len(members.unique())
        assert torch.isin(members, patches).all(), "a newline was merged"
        assert row < 0 or not len(members) or row in members.tolist()


def check_against(truth: Truth, model, inputs, handle=None, first=None) -> None:
    """First-step logits, greedy tokens, logits of every step, and the length of the cache; `first`
    is the output of a forward on the inputs, where one was run already."""
    out = model.generate(
        **inputs,
        max_new_tokens=STEPS,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    tokens = out.sequences[:, -STEPS:]
    assert torch.equal(out.sequences[:, :-STEPS], inputs["input_ids"])
    # Along the tokens that were found: if all logits agree, so does every choice.
    steps = [truth.next_logits(b, row[:-1]) for b, row in enumerate(tokens.tolist())]
    logits = torch.stack(steps, 1)
    torch.testing.assert_close(torch.stack(out.logits), logits, **TOLERANCE)
    assert torch.equal(logits.argmax(-1).T, tokens)
    with torch.no_grad():
        first = first or model(**inputs)
    assert first.logits.shape[:2] == inputs["input_ids"].shape
    torch.testing.assert_close(first.logits[:, -1], logits[0], **TOLERANCE)

    lengths = [truth.layer_lengths(b) for b in range(len(truth.rows))]
    physical = [layer.keys.shape[-2] for layer in first.past_key_values.layers]
    assert physical == [max(column) for column in zip(*lengths, strict=True)]
    cache = out.past_key_values
    physical = [layer.keys.shape[-2] for layer in cache.layers]
    assert physical == [max(column) + STEPS - 1 for column in zip(*lengths, strict=True)]
    assert cache.get_seq_length() == inputs["input_ids"].shape[1] + STEPS - 1
    if handle is not None:
        text = [int((~zoo.is_visual(row.ids)).sum()) for row in truth.rows]
        visual = [[n - t for n in row] for row, t in zip(lengths, text, strict=True)]
        assert [list(row) for row in handle.last.tokens_per_layer] == visual
        assert list(handle.last.text_tokens) == text


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
    kept = [torch.arange(0, count, 3) for count in case.counts(zoo.BATCH)]
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


@pytest.mark.parametrize(
    ("case", "attention", "budget", "positions"),
    [
        pytest.param(case, *given, id=f"{run}-{case.name}")
        for case in zoo.CASES.values()
        for run, given in RUNS.items()
        if given[0] == "sdpa" or case.name in zoo.TWO_NAMES
    ],
)
@zoo.METHODS
def test_equals_the_oracle(case, attention, budget, name, positions):
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
        first = model(**inputs)
        kept = check_kept(case, rows, handle, lambda n: budget_of(budget, n))
        for image, indices in zip(zoo.images(rows), kept, strict=True):
            assert torch.equal(alone.setdefault(image, indices), indices), "depends on the batch"
        if rows != (zoo.TWO,):
            assert positions_of(case, handle) == positions
            check_against(truth_of(case, inputs, model, handle), model, inputs, handle, first)


@zoo.ALL
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


@zoo.ALL
@pytest.mark.parametrize("name", ADAPTIVE)
def test_methods_that_need_no_budget_equal_the_oracle(case, name):
    model = case.model()
    handle = zoo.patch_or_refusal(model, case, name)
    if handle is None:
        return
    method = handle.methods[0].method
    for rows in (zoo.SINGLE, zoo.BATCH):
        inputs = case.inputs(rows)
        model(**inputs)
        found = iter(handle.last.tokens_kept)
        check_kept(case, rows, handle, lambda _, found=found: next(found))
        for tiling, count in zip(case.tilings(rows), handle.last.tokens_kept, strict=True):
            assert 0 <= count <= most(method, tiling)
        check_against(truth_of(case, inputs, model, handle), model, inputs, handle)


@VIDEO
@zoo.METHODS
def test_videos_equal_the_oracle(case, name):
    model = case.model()
    handle = zoo.patch_or_refusal(model, case, name, keep_ratio=0.4)
    if handle is None:
        return
    inputs = case.inputs(zoo.MIXED)
    first = model(**inputs)
    check_kept(case, zoo.MIXED, handle, lambda n: budget_of({"keep_ratio": 0.4}, n))
    check_against(truth_of(case, inputs, model, handle), model, inputs, handle, first)


@zoo.ALL
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


# --- rows that are merged or moved -------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Blend(BeforeLLM):
    """Every third token from last to first, each second of them blended with its neighbour; in
    front a row that is no token."""

    name: ClassVar[str] = "blend"
    scopes: ClassVar[tuple[Scope, ...]] = ("image", "tile")
    projected: bool = False
    moved: bool = True
    seen: list[Selection] = field(default_factory=list)

    @property
    def source(self) -> Signal:
        return Features() if self.projected else EncoderFeatures()

    def needs(self, shape):
        return (self.source,)

    def select(self, tokens, keep):
        features = tokens.signals[self.source]
        kept = (torch.arange(keep) * 3) % tokens.num_tokens
        if len(kept.unique()) < keep:
            kept = torch.arange(keep)
        order, extra = kept.sort().values, 0
        if self.moved:
            order, extra = torch.cat([order.new_tensor([-1]), order.flip(0)[: keep - 1]]), 1
        rows = torch.arange(extra, keep, 2)
        partners = (order[rows] + 1) % tokens.num_tokens
        blended = 0.25 * features[order[rows]] + 0.75 * features[partners]
        if self.moved:
            rows = torch.cat([torch.tensor([0]), rows])
            blended = torch.cat([features.mean(0, keepdim=True), blended])
        members = torch.stack([order[rows[extra:]], partners]).T.flatten()
        chosen = Selection(
            kept=order[order >= 0].sort().values,
            order=order if self.moved else None,
            features=blended,
            rows=rows,
            projected=self.projected,
            groups=torch.stack([rows[extra:].repeat_interleave(2), members]),
        )
        self.seen.append(chosen)
        return chosen


def project(model, rows: torch.Tensor) -> torch.Tensor:
    """Rows of encoder features (K, C) as the LLM would see them."""
    core = model.base_model
    if not hasattr(core, "visual"):
        return core.multi_modal_projector(rows)
    patches = rows.view(-1, rows.shape[-1] // core.visual.config.spatial_merge_size**2)
    return core.visual.merger(patches)


@zoo.ALL
@pytest.mark.parametrize("positions", ["original", "repacked"])
@pytest.mark.parametrize("projected", [False, True], ids=["encoder", "projected"])
@pytest.mark.parametrize("moved", [False, True], ids=["in-place", "moved"])
def test_merged_and_moved_rows_enter_as_the_method_says(case, positions, projected, moved):
    if positions == "repacked" and case.fixed_positions:
        return
    method = Blend(projected=projected, moved=moved, scope="image")
    model, inputs = case.model(), case.inputs(zoo.BATCH)
    call = MethodCall(method=method, budget=Budget("keep_ratio", 0.3))
    handle = vlmprune.patch(model, call, positions=positions)
    model(**inputs)
    check_kept(case, zoo.BATCH, handle, lambda n: budget_of({"keep_ratio": 0.3}, n))
    emitted = list(method.seen)
    cuts = rows_that_enter(case, inputs, model, handle)
    assert len(emitted) == len(cuts)
    for chosen, entered, tiling in zip(emitted, cuts, case.tilings(zoo.BATCH), strict=True):
        # Newlines are no rows here, as their policy is "drop": row j is the method's row j.
        expected = chosen.features if projected else project(case.reference(), chosen.features)
        torch.testing.assert_close(entered.embeds[chosen.rows], expected, **TOLERANCE)
        numbers = torch.cat([tiling.patches(chosen.kept.device), torch.tensor([-1])])
        order = chosen.kept if chosen.order is None else chosen.order
        assert torch.equal(entered.order, numbers[order])
    truth = Truth(case.reference("eager"), inputs, [(0, cuts)], positions)
    check_against(truth, model, inputs, handle)


@zoo.ALL
@pytest.mark.parametrize("scope", ["image", "tile"])
@pytest.mark.parametrize("newlines", ["drop", "keep"])
def test_merged_rows_of_tiles_and_newlines_join(case, scope, newlines):
    """Tiles one by one, and newlines between rows that were moved: the report says which."""
    method = Blend(scope=scope, newlines=newlines)
    model, inputs = case.model(), case.inputs(zoo.BATCH)
    handle = vlmprune.patch(model, MethodCall(method=method, budget=Budget("keep_ratio", 0.4)))
    model(**inputs)
    check_kept(case, zoo.BATCH, handle, lambda n: budget_of({"keep_ratio": 0.4}, n))
    for kept, tiling in zip(handle.last.kept, case.tilings(zoo.BATCH), strict=True):
        line = tiling.newlines(kept.device)
        assert int(torch.isin(line, kept).sum()) == (len(line) if newlines == "keep" else 0)
    check_against(truth_of(case, inputs, model, handle), model, inputs, handle)


@zoo.ALL
@pytest.mark.parametrize("layer", [1, 3])
def test_a_decoder_method_cuts_merged_and_moved_rows(case, layer):
    first = MethodCall(method=Blend(scope="image"), budget=Budget("keep_ratio", 0.5))
    second = vlmprune.method("fastv", keep_ratio=0.2, layer=layer)
    model, inputs = case.model(), case.inputs(zoo.BATCH)
    with vlmprune.patch(model, first) as handle:
        model(**inputs)
        entered = rows_that_enter(case, inputs, model, handle)
    handle = vlmprune.patch(model, [first, second])
    model(**inputs)
    check_kept(case, zoo.BATCH, handle, lambda n: budget_of({"keep_ratio": 0.2}, n))
    positions = positions_of(case, handle)
    truth = Truth(case.reference("eager"), inputs, [(0, entered)], positions)
    scores = [image for b in range(len(zoo.BATCH)) for image in truth.last_row(b, layer - 1)]
    counts, alive = case.counts(zoo.BATCH), []
    for i, rows in enumerate(entered):
        best = scores[i].topk(handle.last.tokens_kept[i]).indices.sort().values
        order = rows.order[best]
        assert torch.equal(handle.last.order[i], order)
        assert torch.equal(handle.last.kept[i], order[order >= 0].sort().values)
        alive.append(rows.slots(counts[i])[best])
    truth = Truth(case.reference("eager"), inputs, [(0, entered), (layer, alive)], positions)
    check_against(truth, model, inputs, handle)
    found = truth_of(case, inputs, model, handle)
    assert all(torch.equal(found.alive(b), truth.alive(b)) for b in range(len(zoo.BATCH)))


@zoo.ALL
def test_pooled_rows_are_means_of_the_features_that_the_unpatched_model_gives(case):
    model, inputs = case.model(), case.inputs(zoo.BATCH)
    handle = vlmprune.patch(model, "pool", keep_ratio=0.2)
    model(**inputs)
    entered = rows_that_enter(case, inputs, model, handle)
    dense = features_of(case.reference(), inputs)
    assert any(len(members) > 1 for groups in handle.last.groups for members in groups)
    for rows, features, groups in zip(entered, dense, handle.last.groups, strict=True):
        for embedding, members in zip(rows.embeds, groups, strict=True):
            torch.testing.assert_close(embedding, features[members].mean(0), **TOLERANCE)


# --- several methods ---------------------------------------------------------------------------


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
        ((43, "A", 3), (3, "A", 4, "B", 3)),
    ],
    ids=[
        "image-first",
        "adjacent-images",
        "twice-the-same",
        "long-text-beside",
        "image-last",
        "as-long-but-two-images",
    ],
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
    assert [layer for layer, _ in cuts] == [call.method.cuts(case.shape)[0].layer for call in calls]
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
    width, inner = zoo.DECODER["hidden_size"], zoo.DECODER["intermediate_size"]

    def flops(tokens: int) -> int:
        return tokens * (4 * width**2 + 3 * width * inner) + 2 * tokens**2 * width

    best = min(range(1, n), key=lambda k: abs(flops(k) / flops(n) - 0.5))
    assert len(handle.last.kept[0]) == best


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

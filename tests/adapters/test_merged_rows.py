"""Rows that a method before the LLM merges or moves enter, and are cut, as the oracle says."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import ClassVar

import pytest
import torch
import vlmprune
from kit import zoo
from kit.beside_oracle import budget_of, check_against, check_kept, positions_of
from kit.oracle import Truth
from kit.reported import TOLERANCE, features_of, rows_that_enter, truth_of
from vlmprune.prune.budget import Budget, MethodCall
from vlmprune.prune.contract import BeforeLLM, EncoderFeatures, Features, Scope, Selection, Signal


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


@zoo.WHOLE
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


@zoo.each(("scope", "newlines"), itertools.product(["image", "tile"], ["drop", "keep"]))
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


@zoo.WHOLE
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

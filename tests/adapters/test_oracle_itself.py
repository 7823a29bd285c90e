"""The oracle itself: without cuts it is the unpatched model, and its two ways of a cut agree."""

from __future__ import annotations

import pytest
import torch
from kit import zoo
from kit.beside_oracle import check_against
from kit.oracle import Truth
from kit.reported import TOLERANCE


@zoo.WHOLE
@pytest.mark.parametrize("by_layer", [False, True], ids=["language-model", "layer-loop"])
def test_the_oracle_without_cuts_is_the_unpatched_model(case, by_layer):
    model, inputs = case.reference("sdpa"), case.inputs(zoo.BATCH)
    check_against(Truth(case.reference("eager"), inputs, by_layer=by_layer), model, inputs)


@zoo.WHOLE
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


@zoo.STORING
def test_the_oracle_reads_the_attention_row_that_eager_attention_has(case):
    model, inputs = case.reference("eager"), case.inputs(zoo.BATCH)
    maps = model(**inputs, output_attentions=True).attentions
    truth = Truth(model, inputs)
    for row, spec in enumerate(truth.rows):
        for layer, attention in enumerate(maps):
            for image, found in zip(spec.images, truth.last_row(row, layer), strict=True):
                expected = attention[row].mean(0)[-1, spec.columns[image]]
                torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-3)

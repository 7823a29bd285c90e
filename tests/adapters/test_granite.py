"""Granite Vision is a LLaVA-NeXT whose projector reads several layers of SigLIP, and whose decoder
scales embeddings, attention and residuals by numbers of its own."""

from __future__ import annotations

import pytest
import torch
import vlmprune
from kit import zoo
from kit.beside_oracle import check_against
from kit.oracle import Truth
from kit.reported import truth_of
from vlmprune.adapters.family import IMAGE
from vlmprune.adapters.registry import family_of

CASE = zoo.OF_TESTS["llava_next"].GRANITE


def answers(model, inputs):
    return model(**inputs).logits, model.generate(**inputs, max_new_tokens=3, do_sample=False)


@pytest.mark.parametrize("name", ["divprune", "fastv"])
def test_a_full_budget_and_a_removed_patch_change_no_bit(name):
    model, inputs = CASE.model(), CASE.inputs(zoo.BATCH)
    dense = answers(model, inputs)
    before = zoo.hooks(model)
    with vlmprune.patch(model, name, keep_ratio=1.0):
        assert all(map(torch.equal, answers(model, inputs), dense))
    with vlmprune.patch(model, name, keep_ratio=0.3):
        assert not torch.equal(answers(model, inputs)[0], dense[0])
    assert zoo.hooks(model) == before
    assert all(map(torch.equal, answers(model, inputs), dense))


@pytest.mark.parametrize("name", ["divprune", "pool", "fastv", "sparsevlm", "hiprune"])
def test_logits_and_tokens_equal_the_oracle(name):
    model, inputs = CASE.model(), CASE.inputs(zoo.BATCH)
    handle = vlmprune.patch(model, name, keep_ratio=0.4)
    model(**inputs)
    assert handle.last.tokens_in == CASE.counts(zoo.BATCH)
    check_against(truth_of(CASE, inputs, model, handle), model, inputs, handle)


def test_fastv_ranks_by_the_attention_that_the_decoder_has():
    """Its scale is the configuration's, not that of the heads' width."""
    inputs = CASE.inputs(zoo.BATCH)
    model = CASE.model()
    with vlmprune.patch(model, "fastv", keep_ratio=0.4, layer=2) as handle:
        model(**inputs)
    truth = Truth(CASE.reference("eager"), inputs, by_layer=True)
    rows = [row for b in range(len(zoo.BATCH)) for row in truth.last_row(b, 1)]
    for row, kept in zip(rows, handle.last.kept, strict=True):
        assert torch.equal(row.topk(len(kept)).indices.sort().values, kept)


def test_the_projector_reads_four_layers_side_by_side():
    model, inputs = CASE.reference(), CASE.inputs(zoo.BATCH)
    family = family_of(model)
    given = zoo.encoder_inputs(inputs)["image"]
    call = family.call(IMAGE, given)
    with torch.no_grad():
        output = model.model.get_image_features(**given, return_dict=True)
        found = family.merged_patches(call, family.encoder_features(call, output))
        # The thumbnail is as it was encoded, the canvas behind it cut and with newlines.
        for rows, features in zip(found, output.pooler_output, strict=True):
            assert rows.shape[1] == 4 * zoo.TOWER["hidden_size"]
            projected = family.project(rows[: zoo.SIDE**2])
            torch.testing.assert_close(projected, features[: zoo.SIDE**2], atol=1e-4, rtol=1e-4)


def test_methods_inside_the_encoder_are_refused():
    with pytest.raises(vlmprune.UnsupportedModelError, match="several of its layers"):
        vlmprune.patch(CASE.model(), "tome", keep_ratio=0.5)

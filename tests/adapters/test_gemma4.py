"""Gemma 4 beside what all families are asked: variants that are refused, padding, selections."""

from __future__ import annotations

import pytest
import torch
import vlmprune
from kit import zoo
from kit.reported import TOLERANCE, truth_of
from transformers import AutoModelForImageTextToText
from vlmprune.adapters.family import IMAGE, VIDEO, Call
from vlmprune.adapters.registry import family_of
from vlmprune.eval.models.families.gemma4 import tiny_gemma4

CASE = zoo.CASES["gemma4"]
SHARING, EXPERTS = (getattr(zoo.OF_TESTS["gemma4"], name) for name in ("SHARING", "EXPERTS"))


def test_text_that_sees_ahead_is_refused():
    model = AutoModelForImageTextToText.from_config(tiny_gemma4(both_ways="all"))
    before = zoo.hooks(model)
    with pytest.raises(vlmprune.UnsupportedModelError, match="sees what is behind it"):
        vlmprune.patch(model, "divprune", keep_ratio=0.5)
    assert zoo.hooks(model) == before


@pytest.mark.parametrize(
    ("case", "name", "words"),
    [
        (SHARING, "pyramiddrop", "layer 6, and the last 2 .* at the latest"),
        (SHARING, "elastic_cache", "k_proj of decoder layer 6"),
        (EXPERTS, "corematching", "experts of its own"),
        (EXPERTS, "transprune", "experts act beside it"),
    ],
    ids=lambda given: getattr(given, "name", given),
)
def test_what_variants_cannot_is_refused(case, name, words):
    model = case.model()
    before = zoo.hooks(model)
    with pytest.raises((vlmprune.UnsupportedModelError, vlmprune.MissingSignalError), match=words):
        vlmprune.patch(model, name, keep_ratio=0.5)
    assert zoo.hooks(model) == before


@pytest.mark.parametrize("name", ["vtw", "fastv"])
def test_a_cut_that_is_too_deep_is_told_the_deepest(name):
    model, budget = SHARING.model(), {} if name == "vtw" else {"keep_ratio": 0.5}
    with pytest.raises(vlmprune.UnsupportedModelError, match="give layer=4 or less, or use"):
        vlmprune.patch(model, name, layer=6, **budget)
    with vlmprune.patch(model, name, layer=4, **budget) as handle, torch.no_grad():
        model(**SHARING.inputs(zoo.BATCH))
        assert handle.last.tokens_kept == ([0] * 3 if name == "vtw" else [12, 8, 8])


def generated(model, inputs):
    options = {"max_new_tokens": 3, "do_sample": False}
    return model.generate(**inputs, **options, return_dict_in_generate=True, output_logits=True)


@pytest.mark.parametrize(
    ("case", "name", "fields"),
    [
        (SHARING, "divprune", {}),
        (SHARING, "prumerge", {"scores": "received"}),
        (SHARING, "fastv", {"layer": 4}),
        (SHARING, "sparsevlm", {}),
        (SHARING, "sparsevlm_plus", {}),
        (EXPERTS, "sparsevlm", {}),
    ],
    ids=lambda given: getattr(given, "name", str(given)),
)
def test_variants_equal_the_oracle(case, name, fields):
    """Prefills of `generate` go through the last layers with the last token alone."""
    model, inputs = case.model("eager"), case.inputs(zoo.BATCH)
    with torch.no_grad():
        dense = model(**inputs).logits
        handle = vlmprune.patch(model, name, keep_ratio=0.4, **fields)
        whole = model(**inputs).logits
        last = model(**inputs, logits_to_keep=2).logits
        out = generated(model, inputs)
    truth = truth_of(case, inputs, model, handle)
    for row, spec in enumerate(truth.rows):
        torch.testing.assert_close(whole[row, spec.columns], truth.full_logits(row), **TOLERANCE)
        changed = (whole - dense)[row, spec.columns].abs().max()
        assert (changed > 0.1) == bool(spec.images), "it had nothing to show"
    torch.testing.assert_close(last, whole[:, -2:], **TOLERANCE)
    tokens, logits = truth.decode(3)
    assert torch.equal(out.sequences[:, -3:], tokens)
    torch.testing.assert_close(torch.stack(out.logits), logits, **TOLERANCE)


@pytest.mark.parametrize("case", [SHARING, EXPERTS], ids=lambda case: case.name)
def test_a_full_budget_changes_no_bit_of_variants(case):
    model, inputs = case.model(), case.inputs(zoo.BATCH)
    dense, kept = generated(model, inputs), model(**inputs).logits
    with vlmprune.patch(model, "fastv", keep_ratio=1.0):
        assert torch.equal(model(**inputs).logits, kept)
        found = generated(model, inputs)
    assert torch.equal(torch.stack(found.logits), torch.stack(dense.logits))
    assert torch.equal(torch.stack(generated(model, inputs).logits), torch.stack(dense.logits))


@pytest.mark.parametrize("modality", [IMAGE, VIDEO])
def test_some_images_of_a_call_are_encoded_as_among_all(modality):
    model, inputs = CASE.reference(), CASE.inputs(CASE.layout.videos)
    family = family_of(model)
    given = zoo.encoder_inputs(inputs)[modality.name]
    encode = getattr(model.model, modality.encode)
    whole = encode(**given).pooler_output
    for images in ([0], [1], [0, 2]):
        found, call = family.only(Call(modality, given), images)
        assert found == images
        for one, image in zip(encode(**call.inputs).pooler_output, images, strict=True):
            torch.testing.assert_close(one, whole[image])


def test_pixels_have_no_padding():
    given = zoo.encoder_inputs(CASE.inputs(zoo.BATCH))["image"]
    seen = family_of(CASE.reference()).pixels(Call(IMAGE, given))
    for name, pixels in zip(zoo.images(zoo.BATCH), seen, strict=True):
        assert torch.equal(pixels, CASE.layout.pixels(name)[0])

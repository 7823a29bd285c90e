"""Who sees whom in a decoder: tokens that see each other both ways, windows and rotary positions by
kind of layer, capped logits. Signals and logits beside those of eager layers."""

from __future__ import annotations

import pytest
import torch
import vlmprune
from kit import zoo
from kit.decoder_by_hand import check, expected
from kit.recorders import ROWS, Recorder, declared, run
from kit.reported import TOLERANCE, truth_of


def variants(*names: str) -> pytest.MarkDecorator:
    of_tests = zoo.OF_TESTS.values()
    found = [getattr(one, name) for one in of_tests for name in names if hasattr(one, name)]
    return pytest.mark.parametrize("case", found, ids=lambda case: case.name)


VARIANTS = variants("CAPPED", "WINDOWED", "CAUSAL")


@variants("CAPPED", "WINDOWED", "CAUSAL", "SHARING")
def test_signals_are_those_of_eager_layers(case):
    recorder = Recorder(wants=declared())
    run(case, "eager", ROWS, recorder)
    check(recorder, expected(case, ROWS), (1, 3))


@VARIANTS
@pytest.mark.parametrize("name", ["divprune", "fastv", "pyramiddrop"])
def test_logits_equal_the_oracle(case, name):
    model, inputs = case.model("eager"), case.inputs(zoo.BATCH)
    with torch.no_grad():
        dense = model(**inputs).logits
        handle = vlmprune.patch(model, name, keep_ratio=0.4)
        first = model(**inputs).logits
        out = model.generate(
            **inputs,
            max_new_tokens=3,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
    truth = truth_of(case, inputs, model, handle)
    for row, spec in enumerate(truth.rows):
        found = first[row, spec.columns]
        torch.testing.assert_close(found, truth.full_logits(row), **TOLERANCE)
        changed = (found - dense[row, spec.columns]).abs().max()
        assert (changed > 0.1) == bool(spec.images), "it had nothing to show"
    tokens, logits = truth.decode(3)
    assert torch.equal(out.sequences[:, -3:], tokens)
    torch.testing.assert_close(torch.stack(out.logits), logits, **TOLERANCE)


@pytest.mark.parametrize(
    "case", [c for c in zoo.STORING_CASES if not c.whole_cache], ids=lambda case: case.name
)
def test_methods_on_the_cache_are_refused_where_layers_forget(case):
    model = case.model()
    before = zoo.hooks(model)
    with pytest.raises(vlmprune.UnsupportedModelError, match="see the whole prompt"):
        vlmprune.patch(model, "elastic_cache", keep_ratio=0.5)
    assert zoo.hooks(model) == before


@VARIANTS
def test_a_full_budget_changes_no_bit(case):
    model, inputs = case.model("eager"), case.inputs(zoo.BATCH)
    with torch.no_grad():
        dense = model(**inputs).logits
        with vlmprune.patch(model, "fastv", keep_ratio=1.0):
            assert torch.equal(model(**inputs).logits, dense)
        assert torch.equal(model(**inputs).logits, dense)


@pytest.mark.parametrize("given", [{"cache_implementation": "static"}, {"use_cache": False}])
@pytest.mark.parametrize("name", ["paligemma", "gemma3", "gemma4"])
def test_steps_behind_a_prompt_are_causal_whatever_the_cache(name, given):
    """A static cache's masks are made above the model, from the kinds of all of a prompt's tokens;
    without a cache every step makes those of the prompt again."""
    case = zoo.CASES[name]
    model, inputs = case.model(), case.inputs(zoo.BATCH)
    details = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True}
    with vlmprune.patch(model, "fastv", keep_ratio=0.4):
        expected = model.generate(**inputs, **details, output_logits=True)
        found = model.generate(**inputs, **details, **given, output_logits=True)
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits), **TOLERANCE)


def test_without_kinds_of_tokens_gemma_3_is_causal_as_the_model_is():
    case = zoo.CASES["gemma3"]
    model, told = case.model(), case.inputs((zoo.ONE,))
    inputs = {k: v for k, v in told.items() if k != "token_type_ids"}
    with torch.no_grad():
        dense = model(**inputs).logits
        assert not torch.equal(dense, model(**told).logits)
        with vlmprune.patch(model, "fastv", keep_ratio=1.0):
            assert torch.equal(model(**inputs).logits, dense)
        with vlmprune.patch(model, "fastv", keep_ratio=0.4) as handle:
            found = model(**inputs).logits
            truth = truth_of(case, inputs, model, handle)
    columns = truth.rows[0].columns
    torch.testing.assert_close(found[0, columns], truth.full_logits(0), **TOLERANCE)

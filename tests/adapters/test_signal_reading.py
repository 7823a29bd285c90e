"""Signals are read where they are declared, before the last cut, once a prompt; nothing else is."""

from __future__ import annotations

import pytest
import torch
from kit import zoo
from kit.decoder_by_hand import check, expected
from kit.oracle import decoder_of
from kit.recorders import ROWS, CacheRecorder, Recorder, call, declared, likeness, modes, step
from vlmprune.adapters.patching import patch
from vlmprune.adapters.places import prefill as prefill_module
from vlmprune.adapters.signals.table import hear
from vlmprune.prune.contract import Cut, Hidden, ModuleStep, Neurons, Place, TextAttention


@pytest.fixture
def heard(monkeypatch) -> list[tuple[str, int]]:
    """(what was shown, layer) of every call."""
    calls: list[tuple[str, int]] = []

    def spy(what, needs, *args):
        calls.extend((what, layer) for layer in {need.layer for need in needs})
        return hear(what, needs, *args)

    monkeypatch.setattr(prefill_module, "hear", spy)
    return calls


@zoo.BOTH_FAMILIES
def test_a_full_budget_reads_nothing_and_changes_no_bit(case, heard):
    model, recorder = case.model(), Recorder(wants=declared())
    patch(model, call(recorder, 1.0))
    inputs = case.inputs(ROWS)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, case.reference()(**inputs).logits)
    assert not heard and not recorder.seen


@zoo.BOTH_FAMILIES
def test_prompts_without_images_are_not_read(case, heard):
    model = case.model()
    patch(model, call(Recorder(wants=declared())))
    model.generate(**case.inputs((zoo.NONE,)), max_new_tokens=2, do_sample=False)
    assert not heard


@zoo.BOTH_FAMILIES
@pytest.mark.parametrize("layer", [1, 2, 3])
def test_nothing_is_read_behind_the_last_cut_nor_while_decoding(case, layer, heard):
    recorder, model = Recorder(wants=declared(), at=(Cut(Place.DECODER, layer),)), case.model()
    patch(model, call(recorder))
    model.generate(**case.inputs(ROWS), max_new_tokens=3, do_sample=False)
    ran_before = {
        (name, number)
        for name in ("heads", "input", "rotary", "angles", "attention", "mlp", "activations")
        for number in range(layer)
    }
    assert set(heard) == ran_before | {("input", layer), ("heads ahead", layer)}
    assert len(recorder.seen) == len(zoo.images(ROWS))
    assert all(heard.count(one) == 1 for one in heard)


@zoo.WHOLE
def test_a_layer_is_read_only_for_what_is_declared(case, heard):
    wants = (TextAttention(1), ModuleStep(0, "mlp", step), Hidden(2), Neurons(2, likeness))
    model, recorder = case.model(), Recorder(wants=wants, at=(Cut(Place.DECODER, 3),))
    patch(model, call(recorder))
    layers, heard_in_prefill = decoder_of(model).layers, []

    def look(*_):
        hooked = [
            {name for name, m in layer.named_modules() if m._forward_hooks or m._forward_pre_hooks}
            for layer in layers
        ]
        tapped = [hasattr(layer.self_attn.config, "_vlmprune_tap") for layer in layers]
        heard_in_prefill.append((hooked, tapped))

    decoder_of(model).norm.register_forward_pre_hook(look)
    with torch.no_grad():
        model(**case.inputs(ROWS))
    hooked, tapped = heard_in_prefill.pop()
    assert hooked == [{"mlp"}, set(), {"", "mlp.down_proj"}, {""}]
    assert tapped == [False, True, False, False]
    assert all(set(seen.tokens.signals) == set(wants) for seen in recorder.seen)


@zoo.BOTH_FAMILIES
@pytest.mark.parametrize("use_cache", [True, False], ids=["cache", "no-cache"])
@pytest.mark.parametrize("beams", [1, 2])
def test_generate_reads_and_chooses_once(case, use_cache, beams, heard):
    positions = modes(case)[0]
    model, recorder = case.model(), Recorder(wants=declared())
    patch(model, call(recorder), positions=positions)
    kind = {"max_new_tokens": 3, "do_sample": False, "use_cache": use_cache, "num_beams": beams}
    found = model.generate(**case.inputs(ROWS), **kind)[:, -3:]
    assert heard.count(("heads", 0)) == 1
    assert len(recorder.seen) == 2 * len(zoo.images(ROWS))
    truth = expected(case, ROWS, positions)
    check(recorder, truth, (1, 3))
    if beams == 1:
        assert torch.equal(found, truth.truth.decode(3)[0])
    else:
        assert torch.equal(found, truth.truth.beams(3, beams)[0][:, 0])


@zoo.BOTH_FAMILIES
def test_cuts_do_not_see_what_a_method_on_the_cache_declares(case, heard):
    model, recorder, on_cache = case.model(), Recorder(wants=(Hidden(1),)), CacheRecorder()
    patch(model, [call(recorder), call(on_cache, 0.2)])
    with torch.no_grad():
        model(**case.inputs(ROWS))
    assert {layer for _, layer in heard} == {1}
    assert all(Hidden(1) in seen.tokens.signals for seen in recorder.seen)
    assert all(len(seen.tokens.signals) == 1 for seen in recorder.seen)
    assert all(entries.signals for entries in on_cache.seen)

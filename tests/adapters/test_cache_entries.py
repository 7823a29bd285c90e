"""What a method on the KV cache is shown: entries of every layer, beside a decoder written out by
hand."""

from __future__ import annotations

import pytest
import torch
from kit import zoo
from kit.decoder_by_hand import Expected, expected
from kit.oracle import decoder_of
from kit.prefixes import LONG, PREFIX, in_two_calls
from kit.recorders import (
    CLOSE,
    LAYERS,
    ROWS,
    CacheRecorder,
    First,
    Recorder,
    call,
    calls_of,
    declared,
    modes,
)
from vlmprune.adapters.patching import patch
from vlmprune.prune.contract import Hidden, ReceivedInLayer
from vlmprune.prune.errors import MissingSignalError


def check_entries(model, recorder: CacheRecorder, truth: Expected, keep: float) -> None:
    """Layer by layer, the prompts that have more than the method is to keep of them."""
    seen, wants = iter(recorder.seen), recorder.needs(truth.shape)
    for layer in LAYERS:
        module = decoder_of(model).layers[layer].self_attn
        for row, spec in enumerate(truth.truth.rows):
            here, start = truth.rows[row][layer], truth.prefix[row]
            text = len(spec.ids) - sum(map(len, spec.images)) - start
            left = text + sum(max(1, round(keep * len(image))) for image in spec.images)
            new = here.places >= start
            if not spec.images or left >= int(new.sum()):
                continue
            entries = next(seen)
            assert entries.layer == layer and entries.attention is module
            assert torch.equal(entries.visual, zoo.is_visual(spec.ids[here.places[new]]))
            found = (entries.keys, entries.values, entries.queries)
            for value, wanted in zip(found, (here.keys, here.values, here.queries), strict=True):
                torch.testing.assert_close(value, wanted[:, new], **CLOSE)
            torch.testing.assert_close(entries.hidden, here.attention[0][new], **CLOSE)
            for value, wanted in zip(entries.rotary, here.tables, strict=True):
                torch.testing.assert_close(value, wanted[new], **CLOSE)
            signal = ReceivedInLayer(layer)
            assert set(entries.signals) == {signal} & set(wants)
            if entries.signals:
                received = here.maps.mean(0).sum(0)[new]
                torch.testing.assert_close(entries.signals[signal], received, **CLOSE)
    assert next(seen, None) is None


CACHED = (*ROWS, (30, "C", 2))


@zoo.each("attention", ["sdpa", "eager"], [c for c in zoo.STORING_CASES if c.whole_cache])
def test_entries_of_a_padded_batch(case, attention):
    truth, recorder = expected(case, CACHED, cuts=()), CacheRecorder()
    model = case.model(attention)
    patch(model, calls_of([recorder]))
    in_two_calls(model, case, truth.truth, CACHED, None)
    check_entries(model, recorder, truth, 0.3)


@zoo.WHOLE
def test_entries_behind_cuts(case):
    positions = modes(case)[-1]
    truth = expected(case, CACHED, positions, True)
    model = case.model("sdpa")
    recorder = CacheRecorder(wants=(ReceivedInLayer(0), ReceivedInLayer(3)))
    patch(
        model,
        [*calls_of([First(), Recorder(wants=declared())]), call(recorder, 0.2)],
        positions=positions,
    )
    in_two_calls(model, case, truth.truth, CACHED, None)
    assert {entries.layer for entries in recorder.seen} == set(LAYERS)
    check_entries(model, recorder, truth, 0.2)


@zoo.WHOLE
def test_entries_behind_a_cached_text_prefix(case):
    truth, recorder = expected(case, LONG, cuts=(), prefix=PREFIX), CacheRecorder()
    model = case.model("sdpa")
    patch(model, calls_of([recorder]))
    in_two_calls(model, case, truth.truth, LONG, PREFIX)
    check_entries(model, recorder, truth, 0.3)


def test_a_cache_method_is_told_which_signals_are_read_for_it():
    model, recorder = zoo.CASES["llava-clip-llama"].model(), CacheRecorder(wants=(Hidden(1),))
    with pytest.raises(MissingSignalError, match="only ReceivedInLayer is read: CacheEntries"):
        patch(model, call(recorder))


@zoo.BOTH_FAMILIES
def test_full_budgets_show_no_entries(case):
    model, recorder = case.model("sdpa"), CacheRecorder()
    patch(model, call(recorder, 1.0))
    with torch.no_grad():
        model(**case.inputs(ROWS))
    assert not recorder.seen

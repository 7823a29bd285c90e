"""Signals of decoder layers are what the contract says, beside a decoder written out by hand.

A method that records keeps pseudo-random tokens at several cuts; what it saw is compared with
signals of `Expected`: one row, no padding, no cache, whole attention maps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from kit import zoo
from kit.decoder_by_hand import Expected, check, expected
from kit.oracle import Rows as OracleRows
from kit.prefixes import LONG, PREFIX, in_two_calls
from kit.recorders import (
    CLOSE,
    ROWS,
    First,
    Recorder,
    Seen,
    before_a_cut,
    call,
    declared,
    modes,
    pick,
    ran,
    run,
)
from vlmprune.adapters.patching import patch
from vlmprune.prune.contract import (
    Cut,
    Hidden,
    LayerKeys,
    Place,
    Selection,
    TextHidden,
    TextKeys,
)

VIDEOS = pytest.mark.parametrize(
    "case", [c for c in zoo.WHOLE_CASES if c.layout.takes_videos], ids=lambda case: case.name
)

# --- Every family ------------------------------------------------------------------------------


@zoo.each("attention", ["sdpa", "eager"])
def test_all_signals_of_a_padded_batch(case, attention):
    positions = modes(case)[-1] if attention == "sdpa" else "original"
    recorder = Recorder(wants=declared())
    run(case, attention, ROWS, recorder, positions=positions)
    check(recorder, expected(case, ROWS, positions), (1, 3))


@zoo.BOTH_FAMILIES
@zoo.ATTENTION
def test_padding_on_the_right(case, attention):
    recorder = Recorder(wants=declared())
    run(case, attention, ROWS, recorder, padding="right")
    check(recorder, expected(case, ROWS), (1, 3))


@VIDEOS
def test_videos(case):
    recorder = Recorder(wants=declared())
    run(case, "sdpa", case.layout.videos, recorder)
    check(recorder, expected(case, case.layout.videos), (1, 3))


@zoo.WHOLE
def test_cuts_at_every_layer_behind_a_first_stage_before_the_llm(case):
    positions, cuts = (
        modes(case)[-1],
        (Cut(Place.DECODER, 1, 2.0), Cut(Place.DECODER, 2, 1.5), Cut(Place.DECODER, 3)),
    )
    recorder, first = Recorder(wants=declared(), at=cuts), First()
    run(case, "sdpa", ROWS, first, recorder, positions=positions)
    truth = expected(case, ROWS, positions, True, cuts)
    assert all(
        torch.equal(a.kept, b) for a, b in zip(first.seen, truth.truth.cuts[0][1], strict=True)
    )
    check(recorder, truth, (1, 2, 3))


@pytest.mark.parametrize("positions", ["original", "repacked"])
@pytest.mark.parametrize("rows", [ROWS, (zoo.TWO,)], ids=["padded", "single"])
@zoo.ATTENTION
def test_windows(positions, rows, attention):
    recorder = Recorder(wants=declared())
    run(zoo.SLIDING, attention, rows, recorder, positions=positions)
    check(recorder, expected(zoo.SLIDING, rows, positions), (1, 3))


@zoo.BOTH_FAMILIES
def test_a_static_cache(case):
    positions = modes(case)[-1]
    model, recorder = case.model(), Recorder(wants=declared())
    patch(model, call(recorder), positions=positions)
    static = {"cache_implementation": "static", "max_new_tokens": 2, "do_sample": False}
    model.generate(**case.inputs(ROWS), **static)
    check(recorder, expected(case, ROWS, positions), (1, 3))


@zoo.WHOLE
def test_batch_mates_change_no_signal(case):
    together = Recorder(wants=declared())
    run(case, "sdpa", ROWS, together)
    alone = Recorder(wants=declared())
    for row in ROWS:
        if zoo.images([row]):
            run(case, "sdpa", (row,), alone)
    for layer in (1, 3):
        for one, other in zip(together.of(layer), alone.of(layer), strict=True):
            assert torch.equal(one.tokens.alive, other.tokens.alive)
            assert set(one.tokens.signals) == set(other.tokens.signals)
            for want, value in one.tokens.signals.items():
                other_value = other.tokens.signals[want]
                torch.testing.assert_close(value, other_value, atol=4e-5, rtol=1e-4)


OWN_DTYPE = (Hidden, TextHidden, LayerKeys, TextKeys)
"""Signals that come in the model's dtype."""


@zoo.BOTH_FAMILIES
@pytest.mark.parametrize("kind", ["half", "autocast", "train"])
def test_signals_are_float32_and_outside_the_graph(case, kind):
    model, recorder = case.model(), Recorder(wants=declared())
    model = model.to(torch.bfloat16) if kind == "half" else model.requires_grad_(kind == "train")
    patch(model, call(recorder))
    inputs = case.inputs(ROWS)
    inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
        model(**inputs)
    assert recorder.seen
    for seen in recorder.seen:
        for want, value in seen.tokens.signals.items():
            dtype = model.dtype if isinstance(want, OWN_DTYPE) else torch.float32
            assert value.dtype == dtype, want
            assert not value.requires_grad, want


# --- A cached text prefix ----------------------------------------------------------------------

# Windows count columns, so that padding between the calls would be part of them.
FLUSH: tuple[zoo.Row, ...] = ((30, "C", 3), (12, "A", 5))
BEHIND_PREFIX = pytest.mark.parametrize(
    ("case", "rows", "prefix"),
    [
        *(pytest.param(case, LONG, PREFIX, id=case.name) for case in zoo.WHOLE_CASES),
        pytest.param(zoo.SLIDING, FLUSH, (25, 9), id="sliding"),
    ],
)


@BEHIND_PREFIX
def test_behind_a_cached_text_prefix(case, rows, prefix):
    positions = modes(case)[-1]
    truth = expected(case, rows, positions, prefix=prefix)
    model, recorder = case.model("sdpa"), Recorder(wants=declared())
    patch(model, call(recorder), positions=positions)
    in_two_calls(model, case, truth.truth, rows, prefix)
    check(recorder, truth, (1, 3))


# --- Rows that are merged ----------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Merging(Recorder):
    """At its first cut the tokens that go become one row, their mean."""

    name: ClassVar[str] = "merging"

    def select(self, tokens, keep):
        if tokens.layer > self.at[0].layer:
            return super().select(tokens, keep)
        chosen = pick(tokens.layer, tokens.num_tokens, keep - 1)
        gone = torch.ones(tokens.num_tokens, dtype=torch.bool)
        gone[chosen] = False
        gone = gone.nonzero()[:, 0]
        self.seen.append(Seen(tokens, chosen))
        return Selection(
            kept=chosen,
            order=torch.cat([chosen, torch.tensor([-1])]),
            features=tokens.signals[Hidden(tokens.layer)][gone].mean(0, keepdim=True),
            rows=torch.tensor([keep - 1]),
            projected=True,
            groups=torch.stack([torch.full_like(gone, keep - 1), gone]),
        )


@zoo.WHOLE
def test_behind_a_merge(case):
    """Signals of earlier layers are gone, as no one describes the merged row."""
    positions = modes(case)[-1]
    recorder = Merging(wants=declared())
    run(case, "sdpa", ROWS, recorder, positions=positions)
    merged, kept = [], []
    for total in case.counts(ROWS):
        last = round(0.3 * total)
        chosen = pick(1, total, 2 * last - 1)
        rest = torch.tensor(sorted(set(range(total)) - set(chosen.tolist())))
        members = [*chosen[:, None], rest]
        merged.append(OracleRows(torch.cat([chosen, torch.tensor([-1])]), members=members))
        slots = merged[-1].slots(total)
        kept.append(slots[pick(3, len(slots), last)])
    truth = Expected(case, ROWS, ((1, merged), (3, kept)), [positions] * 2)
    wanted = {want for want in ran(recorder.wants, (1, 3), 3) if want.layer > 0}
    wanted -= {want for want in wanted if want.layer == 1 and before_a_cut(want)}
    for (row, place), one, rows in zip(truth.image_rows, recorder.of(3), merged, strict=True):
        image = truth.truth.rows[row].images[place]
        slots = image[rows.slots(len(image))]
        assert torch.equal(one.tokens.alive, rows.order)
        assert set(one.tokens.signals) == wanted
        for want, value in one.tokens.signals.items():
            torch.testing.assert_close(value, truth.signal(want, row, image, slots), **CLOSE)

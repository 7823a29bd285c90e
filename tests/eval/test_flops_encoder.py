"""FLOPs of pictures whose rows leave inside the vision encoder equal torch's counter."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import starmap

import pytest
import torch
import vlmprune
from kit.zoo import CASES, MIXED
from torch.utils._python_dispatch import _disable_current_modes
from vlmprune.adapters.family import IMAGE, MODALITIES
from vlmprune.adapters.places import passage
from vlmprune.adapters.places.padded import PaddedPassage
from vlmprune.adapters.registry import family_of
from vlmprune.adapters.signals.recording import Recording
from vlmprune.eval import cli
from vlmprune.eval.classify.counting import counting
from vlmprune.eval.measure.flops import Flops, ModelCost, _filled, model_cost
from vlmprune.eval.measure.shortened import Shortened, measured, reckoned
from vlmprune.eval.results.store import read_records
from vlmprune.prune.contract import Reduction

pytestmark = pytest.mark.usefixtures("timed_once")

TEXT = 10


@pytest.fixture(autouse=True)
def choosing_uncounted(monkeypatch):
    """Choosing, reading what it is based on and mixing rows are no part of the figures."""

    def uncounted(run):
        def alone(*args, **kwargs):
            with _disable_current_modes():
                return run(*args, **kwargs)

        return alone

    monkeypatch.setattr(passage, "reduce", uncounted(passage.reduce))
    for kind, name in ((Recording, "hear"), (Reduction, "apply"), (PaddedPassage, "restore")):
        monkeypatch.setattr(kind, name, uncounted(getattr(kind, name)))


@dataclass
class Found:
    """Of one picture's prefill."""

    counted: int
    pictures: list[tuple[int, int]]
    rows: list[Shortened]
    reckoned: list[Shortened]
    cost: ModelCost
    entering: list[int]
    text: int
    unread: int

    def flops(self, rows: list[Shortened] | None) -> Flops:
        return self.cost.sample(
            pictures=self.pictures,
            visual_per_layer=self.entering,
            text_tokens=self.text,
            unread_layers=self.unread,
            shortened=rows,
        )


def run(name: str, picture: str, method: str, **budget) -> Found:
    case = CASES[name]
    model, inputs = case.model(), case.inputs([(4, picture, 6)])
    family = family_of(model)
    pictures = list(family.pictures(family.call(IMAGE, inputs))[0])
    with vlmprune.patch(model, method, **budget) as handle:
        with counting() as counter, torch.inference_mode():
            model(**inputs, logits_to_keep=1)
        last, shape = handle.last, family.shape
        (rows,) = measured(handle, last, [pictures], shape)
        tokens = case.num_tokens(picture)
        return Found(
            counted=counter.get_total_flops(),
            pictures=pictures,
            rows=rows,
            reckoned=reckoned(handle.methods, pictures, tokens, shape),
            cost=model_cost(model),
            entering=last.tokens_per_layer[0],
            text=len(case.row_ids((4, picture, 6))) - tokens,
            unread=handle.unread_layers,
        )


BUDGETS = [
    ("tome", {"keep_ratio": 0.5}),
    ("tome", {"r": 2}),
    ("evit", {"keep_ratio": 0.5}),
    ("evit", {"rate": 0.6}),
    ("random_encoder", {"keep_tokens": 5}),
]


@pytest.mark.parametrize(("method", "budget"), BUDGETS)
@pytest.mark.parametrize("case", ["llava-clip-llama", "llava-siglip-qwen2", "qwen2_vl", "qwen3_vl"])
def test_rows_that_left_cost_nothing(case: str, method: str, budget: dict):
    found = run(case, "B", method, **budget)
    short, whole = found.flops(found.rows), found.flops(None)
    assert short.first_token == found.counted
    assert short.vision < whole.vision and short.projector < whole.projector
    assert short.prefill == whole.prefill
    assert found.reckoned == found.rows


def test_rows_that_come_back_cost_the_projector_all_of_them():
    found = run("llava-clip-llama", "B", "expedit", keep_tokens=4)
    short, whole = found.flops(found.rows), found.flops(None)
    assert short.first_token == found.counted
    assert short.vision < whole.vision and short.projector == whole.projector
    assert found.reckoned == found.rows


@pytest.mark.parametrize("method", ["tome", "evit"])
def test_windows_count_as_if_the_largest_were_full(method: str):
    found = run("qwen2_5_vl", "D", method, keep_ratio=0.5)
    (rows,) = found.rows
    vision = found.cost.vision
    windowed = [n for n in range(rows.first, len(vision.blocks)) if n not in vision.full_attention]
    pairs = [vision.blocks[n].per_pair * (4 * rows.at(n, 36)[0]) ** 2 for n in windowed]
    assert windowed
    assert 0 <= found.flops(found.rows).first_token - found.counted < sum(pairs)
    assert found.reckoned == found.rows
    assert found.flops(found.rows).vision < found.flops(None).vision


def test_no_other_way_to_leave_rows_has_as_many_pairs():
    windows = [4, 1, 2, 4]
    ways = [(a, b, c, d) for a in range(5) for b in range(2) for c in range(3) for d in range(5)]
    for rows in range(12):
        most = max(sum(n * n for n in way) for way in ways if sum(way) == rows)
        assert sum(n * n for n in _filled(windows, rows)) == most
    assert sorted(_filled(windows, 11)) == sorted(windows)


@pytest.mark.parametrize("method", ["tome", "evit"])
@pytest.mark.parametrize("picture", ["A", "B", "D"])
def test_what_fills_a_batch_of_tiles_up_does_not_count(method: str, picture: str):
    found = run("llava_next", picture, method, keep_ratio=0.5)
    rows = found.rows
    as_long_as_the_longest = Shortened(
        first=rows[0].first,
        entering=tuple(
            starmap(
                lambda *at: (max(a for a, _ in at), max(m for _, m in at)),
                zip(*(own.entering for own in rows), strict=True),
            )
        ),
    )
    filled = found.flops([as_long_as_the_longest] * len(rows)).first_token
    assert filled == found.counted
    alike = len({own.entering for own in rows}) == 1
    own = found.flops(rows).first_token
    assert own == filled if alike else own < filled


def test_images_and_videos_of_one_call_have_rows_of_their_own():
    case = CASES["qwen2_vl"]
    model, inputs = case.model(), case.inputs(MIXED)
    family = family_of(model)
    pictures = [
        [grid for of_one in family.pictures(family.call(modality, inputs)) for grid in of_one]
        for modality in MODALITIES
    ]
    with vlmprune.patch(model, "tome", keep_ratio=0.5) as handle:
        model(**inputs, logits_to_keep=1)
        found = measured(handle, handle.last, pictures, family.shape)
        left = sum(handle.last.tokens_kept)
    for own, seen in zip(found, pictures, strict=True):
        whole = [rows * columns for rows, columns in seen]
        assert [one.at(0, count)[0] for one, count in zip(own, whole, strict=True)] == whole
    assert sum(one.entering[-1][1] for own in found for one in own) == left


def test_without_a_method_in_the_encoder_all_rows_stay():
    case = CASES["llava-clip-llama"]
    model, inputs = case.model(), case.inputs([(4, "B", 6)])
    shape = family_of(model).shape
    with vlmprune.patch(model, "grid", keep_tokens=4) as handle:
        model(**inputs)
        assert measured(handle, handle.last, [[(6, 6)]], shape) == [[None]]
        assert reckoned(handle.methods, [(6, 6)], 36, shape) == [None]
    with vlmprune.patch(model, "tome", keep_ratio=1.0) as handle:
        model(**inputs)
        assert measured(handle, handle.last, [[(6, 6)]], shape) == [[None]]


def test_a_sweep_of_both_kinds_records_what_the_shorter_encoder_costs(tmp_path):
    words = ["divprune@0.11", "tome@0.5+divprune@0.11"]
    argv = ["--methods", *words, "--limit", "2", "-o", str(tmp_path)]
    assert cli.main(["sweep", *argv]) == 0
    dense, behind, both = (r["flops"] for r in read_records(tmp_path / "runs.jsonl"))
    assert both["vision"] < behind["vision"] < dense["vision"]
    assert both["projector"] == behind["projector"] / 2
    assert both["prefill"] == behind["prefill"] < dense["prefill"]
    assert both["first_token_share"] < behind["first_token_share"] < 1

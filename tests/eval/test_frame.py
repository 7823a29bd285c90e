"""Data frames: what a sweep, a result file and a comparison give to calculate with."""

from __future__ import annotations

import json
import sys

import pandas as pd
import pytest
from kit.reports import fastv, record
from vlmprune.eval.compare.comparison import Comparison, Row
from vlmprune.eval.in_process import sweep_model
from vlmprune.eval.models.loading import load
from vlmprune.eval.results.frame import MissingPackageError, Results
from vlmprune.eval.results.statistics import mean_score
from vlmprune.eval.results.store import read_records
from vlmprune.prune.errors import VlmpruneError

pytestmark = pytest.mark.usefixtures("timed_once")

BOTH = [
    {"name": "divprune", "fields": {"newlines": "compete"}, "budget": None},
    *fastv(0.25),
]
ERROR = {"type": "ValueError", "message": "no"}


def results() -> Results:
    two = {"accuracy": mean_score((1, 0, 0, 1)), "f1": mean_score((0.5, 0, 0, 0.5))}
    return Results(
        [
            record(1),
            record(2, fastv(), share=0.5, scores=two),
            record(3, BOTH, share=0.25),
            record(4, fastv(0.25), status="failed", error=ERROR),
        ]
    )


def test_a_row_a_cell_with_what_it_is_and_what_it_gave():
    frame = results().to_frame()
    assert list(frame["method"]) == [
        "dense",
        "fastv(layer=3)",
        "divprune(newlines=compete)+fastv(layer=3)",
        "fastv(layer=3)",
    ]
    assert list(frame["name"]) == ["dense", "fastv", "divprune+fastv", "fastv"]
    assert frame["fields"][1] == {"layer": 3}
    assert frame["fields"][2] == {"divprune.newlines": "compete", "fastv.layer": 3}
    assert frame["budget"][1] == "0.5" and frame["budget_word"][1] == "keep_ratio"
    assert frame["budget_value"][1] == 0.5 and pd.isna(frame["budget_value"][2])
    assert frame["value"][:2].tolist() == [0.75, 0.5] and frame["score_f1"][1] == 0.25
    assert frame["vs_dense"][1] == -0.25 and pd.isna(frame["vs_dense"][0])
    assert frame["vs_dense_low"][1] < -0.25 < frame["vs_dense_high"][1]
    assert frame["tokens_average_per_layer"][1] == 4.5
    assert frame["flops_visual_share"].tolist()[:3] == [1.0, 0.5, 0.25]
    assert frame["seconds_first_token"][0] == 0.02
    assert frame["status"][3] == "failed" and frame["error"][3] == "ValueError: no"
    assert pd.isna(frame["value"][3])
    assert frame["finished"].dt.year.tolist() == [2026] * 4
    assert frame["version_vlmprune"][0] == "0" and frame["id"].is_unique
    assert frame[frame.status == "ok"].groupby("name")["value"].mean()["fastv"] == 0.5


def test_no_results_are_an_empty_frame():
    assert Results().to_frame().empty


def test_a_result_file_and_a_sweep_give_what_has_frames(tmp_path):
    (tmp_path / "runs.jsonl").write_text(json.dumps(record(1)) + "\n")
    assert read_records(str(tmp_path)).to_frame()["value"].tolist() == [0.75]
    found = sweep_model(*load("embedded", device="cpu"), ["grid"], [0.5], limit=1)
    assert found.to_frame()["name"].tolist() == ["dense", "grid"]
    assert isinstance(found, list)


def test_a_comparison_is_a_frame_with_its_refusals():
    measured = {k: record(1)[k] for k in ("tokens", "flops", "times", "kv_bytes", "notes")}
    measured |= {"peak_memory_bytes": None, "positions": None}
    rows = (
        Row(name="dense", answer="red", correct=True, measured=measured),
        Row(name="cdpruner@0.5", refusal=VlmpruneError("no text encoder")),
    )
    frame = Comparison("what color?", rows).to_frame()
    assert frame["method"].tolist() == ["dense", "cdpruner@0.5"]
    assert frame["refusal"][1] == "no text encoder" and frame["answer"][0] == "red"
    assert frame["tokens_kept_per_image"][0] == 9 and pd.isna(frame["tokens_kept_per_image"][1])


def test_without_pandas_it_is_said_what_to_type(monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(MissingPackageError, match="pip install pandas"):
        results().to_frame()
    with pytest.raises(ImportError, match="pip install pandas"):
        Comparison("q", (Row(name="dense"),)).to_frame()

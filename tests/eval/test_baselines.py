"""Baselines at equal tokens: which cell stands beside another, and the questions that smaller
pictures fail."""

from __future__ import annotations

import csv
import json

import pytest
from kit.reports import fastv, record
from vlmprune.eval import cli
from vlmprune.eval.results.baselines import at_equal_tokens, hard


def named(name, ratio):
    return [{"name": name, "fields": {}, "budget": {"word": "keep_ratio", "value": ratio}}]


DENSE = record(1)
WHOLE = record(2, named("downsample", 0.9), share=0.9, outcomes=(1, 1, 1, 1))
SMALL = record(3, named("downsample", 0.5), share=0.55, outcomes=(1, 0, 0, 0))
METHOD = record(4, fastv(), share=0.5, outcomes=(0, 1, 0, 1))
CELLS = [DENSE, WHOLE, SMALL, METHOD]


def test_the_nearest_cell_of_a_baseline_stands_beside_another():
    assert at_equal_tokens(METHOD, CELLS, "downsample") is SMALL
    assert at_equal_tokens(record(5, fastv(0.2), share=0.2), CELLS, "downsample") is None
    assert at_equal_tokens(METHOD, CELLS, "random") is None
    assert at_equal_tokens(SMALL, CELLS, "downsample") is None
    assert at_equal_tokens(DENSE, CELLS, "downsample") is None


def test_the_same_positions_go_before_the_nearest_count():
    cells = []
    for number, (mode, share) in enumerate(((None, 0.5), ("repacked", 0.45))):
        cells.append(record(number, named("random", share), share=share))
        cells[-1]["config"]["positions"] = mode
    repacked = record(5, fastv(), share=0.5)
    repacked["config"]["positions"] = "repacked"
    assert at_equal_tokens(repacked, cells, "random") is cells[1]
    assert at_equal_tokens(METHOD, cells, "random") is cells[0]


def test_entries_in_the_cache_count_as_tokens():
    cached = record(5, fastv(), share=1.0)
    cached["tokens"] = cached["tokens"] | {"cache_per_image": 9 * 0.5}
    assert at_equal_tokens(cached, CELLS, "downsample") is SMALL


def test_hard_are_the_questions_that_smaller_pictures_fail():
    found = hard(METHOD, CELLS, DENSE, "accuracy")
    assert found is not None and found.beside is SMALL and found.score["n"] == 3
    assert found.score["value"] == found.dense["value"] == pytest.approx(2 / 3)
    assert found.score["low"] < 2 / 3 < found.score["high"]
    assert found.rest["outcomes"] == [0] and found.above_dense[0] == 0.0
    easy = record(6, named("random", 0.9), share=0.9)
    assert hard(easy, CELLS, DENSE, "accuracy") is None  # nothing was failed beside it
    assert hard(METHOD, CELLS, DENSE, "cider") is None


@pytest.fixture
def runs(tmp_path):
    (tmp_path / "runs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in CELLS), "utf-8")
    return tmp_path


def test_reports_show_both(runs):
    for name in ("report.md", "report.csv", "report.html"):
        assert cli.main(["report", str(runs), "-o", str(runs / name), "--hard"]) == 0
    text = (runs / "report.md").read_text("utf-8")
    assert "| fastv(layer=3) | 0.5 | 50.0 [15.0, 85.0] | +25.0" in text
    (row,) = [line for line in text.splitlines() if line.startswith("| fastv(layer=3) | 0.5 | 0.5")]
    assert row.split(" | ")[3:5] == ["3", "66.7 [20.8, 93.9]"]
    rows = list(csv.DictReader((runs / "report.csv").read_text("utf-8").splitlines()))
    assert [row["hard_questions"] for row in rows] == ["", "", "", "3"]
    page = (runs / "report.html").read_text("utf-8")
    assert "Hard questions" in page and "vs downsample" in page


def test_positions_stand_side_by_side(tmp_path):
    modes = {"original": (1, 1, 0, 1), "repacked": (0, 0, 0, 1)}
    records = [record(1)]
    for number, (mode, outcomes) in enumerate(modes.items(), start=2):
        records.append(record(number, fastv(), outcomes=outcomes, positions=mode))
        records[-1]["config"]["positions"] = mode
    (tmp_path / "runs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records), "utf-8")
    assert cli.main(["report", str(tmp_path), "-o", str(tmp_path / "report.md")]) == 0
    text = (tmp_path / "report.md").read_text("utf-8")
    assert "| fastv(layer=3) | 0.5 | 75.0 [30.1, 95.4] | 25.0 [4.6, 69.9] | +50.0" in text


def test_without_such_cells_it_is_refused(tmp_path, capsys):
    (tmp_path / "runs.jsonl").write_text(json.dumps(DENSE) + "\n", "utf-8")
    assert cli.main(["report", str(tmp_path), "--hard"]) == 2
    assert "--methods downsample" in capsys.readouterr().err
    assert cli.main(["report", str(tmp_path), "--hard", "-o", str(tmp_path / "t.tex")]) == 2
    assert "no part of latex" in capsys.readouterr().err

"""Agreement with the dense model: answers that stayed, and outcomes that turned."""

from __future__ import annotations

import csv
import json

import pytest
from kit.reports import fastv, record
from vlmprune.eval import cli
from vlmprune.eval.results.agreement import Agreement, agreement, digest
from vlmprune.eval.results.statistics import aggregate_score

DENSE = record(1, answers=[digest(a) for a in ("a", "b", "c", "d")])
PRUNED = record(
    2, fastv(), outcomes=(1, 0, 1, 1), answers=[digest(a) for a in (" a\n", "x", "y", "D")]
)


def test_it_counts_same_words_and_turned_outcomes():
    assert agreement(PRUNED, DENSE, "accuracy") == Agreement(0.25, 1, 1)
    assert agreement(DENSE, DENSE, "accuracy") == Agreement(1.0, 0, 0)


@pytest.mark.parametrize("lacking", ["both", "the pruned one"])
def test_older_records_have_outcomes_alone(lacking):
    older = {key: value for key, value in PRUNED.items() if key != "answers"}
    dense = DENSE if lacking != "both" else {k: v for k, v in DENSE.items() if k != "answers"}
    assert agreement(older, dense, "accuracy") == Agreement(None, 1, 1)


def test_what_cannot_be_paired_is_not_counted():
    others = record(3, fastv(), outcomes=(1, 0))
    assert agreement(others, DENSE, "accuracy") is None
    points = record(4, fastv(), scores={"accuracy": aggregate_score(50.0, 4, unit="points")})
    assert agreement(points, DENSE, "accuracy") is None
    between = record(5, fastv(), outcomes=(0.5, 1, 0, 1), answers=DENSE["answers"])
    assert agreement(between, DENSE, "accuracy") == Agreement(1.0, None, None)


def test_reports_show_it(tmp_path):
    lines = "".join(json.dumps(each) + "\n" for each in (DENSE, PRUNED))
    (tmp_path / "runs.jsonl").write_text(lines, encoding="utf-8")
    for name in ("report.md", "report.csv", "report.html"):
        assert cli.main(["report", str(tmp_path), "-o", str(tmp_path / name)]) == 0
    shown = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "### Agreement with the dense model" in shown
    (row,) = [line for line in shown.splitlines() if line.endswith("| 25.0 | 1 | 1 |")]
    assert row.startswith("| fastv(layer=3) | 0.5 | 75.0")
    dense, pruned = csv.DictReader((tmp_path / "report.csv").read_text("utf-8").splitlines())
    found = [pruned[key] for key in ("same_answers", "turned_wrong", "turned_right")]
    assert found == ["0.25", "1", "1"] and dense["same_answers"] == ""
    assert "Agreement with the dense model" in (tmp_path / "report.html").read_text("utf-8")

"""Cuts by depth: `--depths` as words of methods, and the table beside chance at the same layer."""

from __future__ import annotations

import json

import pytest
from kit.reports import fastv, record
from vlmprune.eval import cli
from vlmprune.eval.words.depths import at_depths
from vlmprune.prune.errors import MethodFieldError


def test_methods_in_the_decoder_run_at_every_depth():
    words = ["divprune", "fastv@9", "dart:layer=3", "vtc_cls+fastv:seed=1@0.5", "downsample"]
    assert at_depths(words, [1, -1]) == [
        *("divprune", "fastv:layer=1@9", "fastv:layer=-1@9", "dart:layer=3"),
        *("vtc_cls+fastv:seed=1:layer=1@0.5", "vtc_cls+fastv:seed=1:layer=-1@0.5", "downsample"),
    ]
    assert at_depths(words, []) == words
    with pytest.raises(MethodFieldError, match="random_decoder"):
        at_depths(["divprune", "fastv:layer=2"], [1])


def test_numbers_of_layers_alone_are_taken(capsys, tmp_path):
    assert cli.main(["sweep", "--depths", "half", "-o", str(tmp_path)]) == 2
    assert "--depths 2,8,16" in capsys.readouterr().err


def test_a_sweep_at_depths_is_shown_beside_chance(tmp_path):
    words = ["--depths", "2,3", "--methods", "random_decoder,grid", "--budgets", "9"]
    assert cli.main(["sweep", *words, "--limit", "2", "-o", str(tmp_path)]) == 0
    lines = (tmp_path / "runs.jsonl").read_text("utf-8").splitlines()
    cut = [json.loads(line)["config"]["methods"] for line in lines]
    assert [each[0]["fields"].get("layer") for each in cut[1:]] == [2, 3, None]


def test_reports_show_cuts_by_depth(tmp_path):
    chance = [{"name": "random_decoder", "fields": {"layer": 3}, "budget": fastv()[0]["budget"]}]
    records = [record(1), record(2, fastv()), record(3, chance, outcomes=(0, 0, 0, 1))]
    records.append(record(4, fastv(0.25)))
    (tmp_path / "runs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records), "utf-8")
    for name in ("report.md", "report.html"):
        assert cli.main(["report", str(tmp_path), "-o", str(tmp_path / name)]) == 0
    assert "By depth of the cut" in (tmp_path / "report.html").read_text("utf-8")
    text = (tmp_path / "report.md").read_text("utf-8")
    (row,) = [line for line in text.splitlines() if line.startswith("| fastv | 0.5 | 3 | 9.0 |")]
    assert "| 75.0 [30.1, 95.4] | 25.0 [4.6, 69.9] | +50.0" in row

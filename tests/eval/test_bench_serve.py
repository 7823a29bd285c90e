"""A model under load: clients are answered, what is measured is written, failures are raised."""

from __future__ import annotations

import json

import pytest
import torch
from vlmprune.eval import cli
from vlmprune.eval.bench import serve as bench
from vlmprune.eval.bench.load import percentiles
from vlmprune.eval.bench.serve import serve
from vlmprune.eval.bench.subject import Subject

SMALL = Subject(layers=2, width=64, visual_tokens=16)


def test_percentiles_are_values_that_were_measured():
    assert percentiles([3.0, 1.0, 2.0]) == {"p50": 2.0, "p90": 3.0, "p99": 3.0}
    found = percentiles([float(n) for n in range(1, 201)])
    assert found == {"p50": 100.0, "p90": 180.0, "p99": 198.0}


def test_every_client_is_answered_as_often_as_it_asks():
    model, inputs = SMALL.model("cpu"), SMALL.inputs("cpu")
    load = serve(model, inputs, clients=3, requests=2, new_tokens=2)
    assert len(load.asked) == 6 and load.throughput == 6 / load.seconds
    assert all(0 < one.first_token < one.answered <= load.seconds for one in load.asked)


def test_what_stops_a_client_is_raised():
    model, inputs = SMALL.model("cpu"), SMALL.inputs("cpu")
    broken = inputs | {"pixel_values": torch.zeros(2, 3, 4, 4)}
    with pytest.raises(ValueError, match="image"):
        serve(model, broken, clients=2, requests=1, new_tokens=1)


def test_the_command_writes_every_round(tmp_path, capsys, monkeypatch):
    rounds = []
    one = bench.serve
    monkeypatch.setattr(
        "vlmprune.eval.bench.serve.serve",
        lambda model, inputs, **asked: rounds.append(asked) or one(model, inputs, **asked),
    )
    file = tmp_path / "serve.json"
    sizes = ["--layers", "2", "--width", "64", "--tokens", "16", "--new_tokens", "2"]
    argv = [*sizes, "--methods", "divprune", "--budgets", "0.25", "--concurrency", "1,2"]
    assert cli.main(["bench", "serve", *argv, "--repeats", "2", "-o", str(file)]) == 0
    report = json.loads(file.read_text())
    assert report["schema"] == 2 and report["rounds"] == 2 and report["versions"]["torch"]
    rows = [(row["clients"], row["name"], row["requests"]) for row in report["rows"]]
    name = "divprune(keep_ratio=0.25)"
    assert rows == [(1, "dense", 4), (1, name, 4), (2, "dense", 8), (2, name, 8)]
    assert [row["throughput_over_dense"]["median"] for row in report["rows"][::2]] == [1, 1]
    assert len(rounds) == 4 + 2 * 4  # each row warms up once
    assert "| 2 | divprune(keep_ratio=0.25) |" in capsys.readouterr().out

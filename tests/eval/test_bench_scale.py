"""The growth of time and memory: exponents, sizes that are left out, every method's inputs."""

from __future__ import annotations

import json
import time

import pytest
import torch
from vlmprune.eval import cli
from vlmprune.eval.bench import scale
from vlmprune.prune.contract import BeforeLLM
from vlmprune.prune.registry import method_class, method_names

BEFORE = [name for name in method_names() if issubclass(method_class(name), BeforeLLM)]


def test_exponents_are_those_of_the_growth():
    for power in (0, 1, 2):
        points = [(n, 3e-4 * n**power) for n in (256, 1024, 4096, 16384)]
        points[0] = (256, 1.0)  # small sizes do not count
        found = scale.fit(points, least=0)
        assert found["exponent"] == pytest.approx(power, abs=1e-6)
        assert power == 0 or found["r_squared"] == pytest.approx(1)
    bent = scale.fit([(1024, 1.0), (4096, 16.0), (16384, 17.0)], least=0)
    assert 1 < bent["exponent"] < 1.1 and bent["r_squared"] < 0.9
    assert scale.fit([(256, 1.0), (1024, 2.0), (4096, 0.5)], least=1) is None
    assert scale.fit([(1024, 1.0), (4096, 4.0)], least=0)["r_squared"] is None


@pytest.mark.parametrize("layout", ["grid", "frames"])
@pytest.mark.parametrize("name", BEFORE)
@torch.inference_mode()
def test_every_method_before_the_llm_chooses(name, layout):
    choice = scale.Choice.random(name, layout, 1024)
    assert choice.tiling.num_tokens == 1024 and len(choice.tiling.tiles) == (4, 1)[layout == "grid"]
    choice.make()


def test_the_command_writes_what_it_measured(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(scale, "in_fresh_process", lambda measure, *args: 1 << 20)
    file = tmp_path / "scale.json"
    argv = ["--methods", "divprune", "fastv", "--tokens", "256,1024", "--rounds", "1"]
    assert cli.main(["bench", "scale", *argv, "-o", str(file)]) == 0
    report = json.loads(file.read_text())
    assert report["schema"] == 1 and report["versions"]["torch"] and report["hardware"]["cpu"]
    assert [(r["method"], r["layout"]) for r in report["rows"]] == [
        ("divprune", "grid"),
        ("divprune", "frames"),
        ("fastv", "decoder"),
    ]
    for row in report["rows"]:
        assert [size["tokens"] for size in row["sizes"]] == [256, 1024]
        assert all(size["seconds"]["median"] > 0 for size in row["sizes"])
    assert "| divprune | one grid |" in capsys.readouterr().out


def test_what_would_take_too_long_is_left_out(tmp_path, capsys, monkeypatch):
    asked = []
    monkeypatch.setattr(scale, "in_fresh_process", lambda measure, *args: 1 << 20)
    monkeypatch.setattr(scale, "_seconds", lambda *args: asked.append(args[2]) or ([9.0], 20.0))
    file = tmp_path / "scale.json"
    argv = ["--methods", "grid", "--tokens", "256,1024,4096", "--limit", "60", "-o", str(file)]
    assert cli.main(["bench", "scale", *argv]) == 0
    assert asked == [256, 256]  # grid and frames
    (row, _) = json.loads(file.read_text())["rows"]
    assert [size["seconds"] is None for size in row["sizes"]] == [False, True, True]
    assert "| - |" in capsys.readouterr().out


@pytest.mark.parametrize("tokens", ["300", "400", "512"])
def test_sizes_are_squares_of_whole_frames(tokens, capsys):
    assert cli.main(["bench", "scale", "--tokens", tokens]) == 2
    assert "256,1024" in capsys.readouterr().err


@torch.inference_mode()
def test_memory_of_a_choice_is_measured():
    peak = scale.peak_bytes("divprune", "grid", 1024, 1)
    assert peak >= 0
    assert scale.peak_bytes("fastv", "decoder", 256, 1) >= 0


def test_long_rounds_are_not_repeated(monkeypatch):
    monkeypatch.setattr(scale, "LONG", 0.1)
    quick, slow = iter(range(9)), iter(range(9))
    assert scale._repeated(lambda: float(next(quick)), 3)[0] == [1, 2, 3]
    found, elapsed = scale._repeated(lambda: time.sleep(0.2) or float(next(slow)), 3)
    assert found == [0] and elapsed >= 0.2


def test_methods_inside_the_encoder_are_timed_elsewhere(capsys):
    assert cli.main(["bench", "scale", "--methods", "divprune,tome"]) == 2
    said = capsys.readouterr().err
    assert "tome" in said and "bench model" in said and "divprune" not in said

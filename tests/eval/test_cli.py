"""The command line: quick help, exit codes, one-line errors, and whole commands on tiny models."""

from __future__ import annotations

import functools
import importlib
import json
import subprocess
import sys
import typing

import pytest
import vlmprune
from kit.fakes import FakeProcessor, FakeTask
from kit.zoo import CASES
from PIL import Image
from vlmprune.eval import cli
from vlmprune.eval.arguments.sweep import DEFAULT_METHODS
from vlmprune.eval.measure.evaluate import Evaluator
from vlmprune.eval.words.typed import DOWNSAMPLE, parse_fields, split_list
from vlmprune.prune.registry import method_class

pytestmark = pytest.mark.usefixtures("timed_once")

COMMANDS = (
    *("sweep", "report", "presets", "ask", "compare", "classify", "bench"),
    *("methods", "models", "where", "vllm-args"),
)
CLIP = CASES["llava-clip-llama"]


def error_of(capsys, *argv: str) -> str:
    """The one line that a wrong command writes; it must exit with 2."""
    try:
        code = cli.main(argv)
    except SystemExit as stop:  # argparse's way out
        code = stop.code
    captured = capsys.readouterr()
    assert code == 2
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert "Traceback" not in line and line.startswith("vlmprune")
    return line


# --- Help ------------------------------------------------------------------------------------


def test_every_verb_has_a_command_that_takes_one_frozen_request():
    verbs = [*cli.VERBS.values(), *cli.BENCHES.values()]
    for verb in verbs:
        assert isinstance(verb.HELP, str) and (verb.EXAMPLES is None or verb.EXAMPLES)
        if verb is cli.bench:  # its WHATs are verbs
            continue
        name = verb.__name__.rpartition(".")[2]
        command = importlib.import_module(f"vlmprune.eval.commands.{name}")
        (taken,) = typing.get_type_hints(command.run, include_extras=True).keys() - {"return"}
        request = typing.get_type_hints(command.run)[taken]
        assert request.__dataclass_params__.frozen and request.__name__.endswith("Request")


def test_no_help_imports_torch():
    program = """
import contextlib, io, sys
from vlmprune.eval.cli import main
for argv in [["--help"], ["--version"], *([c, "--help"] for c in sys.argv[1:])]:
    out = io.StringIO()
    try:
        with contextlib.redirect_stdout(out):
            main(argv)
    except SystemExit as stop:
        assert stop.code == 0, argv
    assert "vlmprune" in out.getvalue(), argv
heavy = {"torch", "transformers", "matplotlib", "rich", "numpy", "PIL"} & set(sys.modules)
assert not heavy, heavy
"""
    run = subprocess.run(
        [sys.executable, "-c", program, *COMMANDS], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr


def test_every_command_has_help_with_its_defaults(capsys):
    for command in COMMANDS:
        with pytest.raises(SystemExit):
            cli.main([command, "--help"])
        text = capsys.readouterr().out
        assert f"vlmprune {command}" in text and "--verbosity" in text
    with pytest.raises(SystemExit):
        cli.main(["sweep", "--help"])
    text = capsys.readouterr().out
    assert all(method in text for method in DEFAULT_METHODS)
    assert "./vlmprune_runs" in text and "examples:" in text
    assert set(DEFAULT_METHODS) <= {*vlmprune.methods(), DOWNSAMPLE}


# --- Errors ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["swep"], "sweep"),
        (["sweep", "--limit", "0"], "all"),
        (["sweep", "--limit", "some"], "all"),
        (["sweep", "-b", "none"], "at least 1"),
        (["sweep", "--positions", "both"], "repacked"),
        (["sweep", "--methods", "divprun"], "Did you mean: divprune"),
        (["sweep", "--methods", "fastv:layr=2"], "Did you mean: layer"),
        (["sweep", "--methods", "fastv:layer"], "field=value"),
        (["sweep", "--methods", "grid:keep_ratio=0.5"], "--budgets"),
        (["sweep", "--methods", "divprune@0.5+fastw"], "Did you mean: fastv"),
        (["sweep", "--methods", "fastv@0.5:layer=3"], "fastv:layer=3@0.25"),
        (["sweep", "--methods", "fastv@published"], "fastv@0.25"),
        (["sweep", "--kinds", "reed"], "Did you mean: read"),
        (["sweep", "--budgets", "1.5"], "above 0 and at most 1"),
        (["sweep", "--budgets", "half"], "avg:64"),
        (["sweep", "--device", "gpu"], "cpu, cuda"),
        (["ask", "x.png", "why?", "--method", "grid"], "keep_ratio"),
        (["ask", "x.png", "why?", "--method", "grid@0.5+fastv"], "fastv@0.25"),
        (["ask", "x.png", "why?", "--method", "grid@0.5", "--keep_ratio", "0.5"], "leave"),
        (
            ["ask", "x.png", "y", "--method", "grid@9+fastv@5", "--method_args", "layer=3"],
            "divprune@0.5+fastv:layer=3",
        ),
        (["ask", "no.png", "why?", "--method", "grid", "--keep_ratio", "0.5"], "no.png"),
        (["ask", "no.png", "--method", "grid", "--keep_ratio", "0.5"], "no.png"),
        (
            ["ask", "x.png", "y", "--method", "grid", "--keep_ratio", "1", "--keep_tokens", "3"],
            "not allowed with",
        ),
        (["ask", "x.png", "y", "--method", "fastv", "--method_args", "layer"], "field=value"),
        (["bench", "model", "--tokens", "10"], "square"),
        (["where", "weights"], "model"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_usage_is_one_line_and_exit_code_2(capsys, tmp_path, monkeypatch, argv, says):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (8, 8)).save("x.png")
    assert says in error_of(capsys, *argv)


def test_debug_shows_the_traceback(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv = ["sweep", "--methods", "divprun", "--verbosity", "debug"]
    assert cli.main(argv) == 2
    assert "Traceback" in capsys.readouterr().err


def test_no_command_prints_the_help(capsys):
    assert cli.main([]) == 2
    assert "sweep" in capsys.readouterr().out


# --- Small pieces ----------------------------------------------------------------------------


def test_lists_take_commas_and_spaces():
    assert split_list(["a,b", "c", "d,"]) == ["a", "b", "c", "d"]
    assert split_list(["a:x=(1,2),b", "c:y=[3,4]@0.5+d,e"]) == [
        "a:x=(1,2)",
        "b",
        "c:y=[3,4]@0.5+d",
        "e",
    ]
    assert parse_fields(["layers=[3,4]"]) == {"layers": (3, 4)}
    assert parse_fields(["layer=3", "alpha=0.1", "mode=max", "official=true", "x=None"]) == {
        "layer": 3,
        "alpha": 0.1,
        "mode": "max",
        "official": True,
        "x": None,
    }


def test_methods_and_models_are_listed_from_the_registries(capsys):
    assert cli.main(["methods"]) == 0
    out = capsys.readouterr().out
    rows = [line.split("|")[1].strip() for line in out.splitlines() if line.startswith("|")]
    assert rows[2:] == vlmprune.methods()
    assert "2403.06764" in out  # FastV's paper
    cells = {
        row.split("|")[1].strip(): [c.strip() for c in row.split("|")[2:-1]]
        for row in out.splitlines()
        if row.startswith("|")
    }
    assert cells["Method"][4] == "Budget"
    assert cells["fastv"][1:5] == [
        "in the LLM decoder",
        "in the decoder: text attention",
        "all tokens",
        "needed",
    ]
    assert cells["pyramiddrop"][4] == cells["prumerge"][4] == "or published"
    assert cells["grid"][2] == "sizes only" and cells["divprune"][2] == "features"
    both = [name for name in vlmprune.methods() if len(method_class(name)().places) > 1]
    assert all(cells[name][1] == "before the LLM and in the LLM decoder" for name in both)
    assert cli.main(["models"]) == 0
    out = capsys.readouterr().out
    assert all(f"| {name} |" in out for name in vlmprune.models())


def test_where_prints_folders_of_the_package(capsys):
    assert cli.main(["where", "data"]) == 0
    assert capsys.readouterr().out.strip().endswith("data")
    assert cli.main(["where", "model"]) == 0
    assert capsys.readouterr().out.strip().endswith("model")


# --- Whole commands --------------------------------------------------------------------------


@pytest.fixture
def tiny(monkeypatch):
    """The embedded model and benchmark replaced by the zoo's, and one question timed."""
    from vlmprune.eval.arguments import early
    from vlmprune.eval.commands import benchmarks
    from vlmprune.eval.commands import sweep as sweep_command

    monkeypatch.setattr(early, "KINDS", {"short", "long"})
    quick = functools.partialmethod(Evaluator.__init__, timed_questions=1)
    monkeypatch.setattr(Evaluator, "__init__", quick)

    def use(case):
        monkeypatch.setattr(
            sweep_command, "load", lambda *_, **__: (case.model(), FakeProcessor(case))
        )
        shipped = {benchmarks.TASK: FakeTask()}
        monkeypatch.setattr(benchmarks, "shipped_tasks", lambda: shipped)

    use(CLIP)
    return use


def sweep(tmp_path, *argv: str) -> int:
    return cli.main(
        ["sweep", "-o", str(tmp_path), "--methods", "grid,fastv", "--budgets", "0.5", "9", *argv]
    )


def test_sweep_writes_results_table_and_picture(tiny, tmp_path, capsys):
    assert sweep(tmp_path, "--limit", "4", "--log_samples") == 0
    captured = capsys.readouterr()
    assert captured.out == (tmp_path / "table.md").read_text()
    records = [json.loads(line) for line in (tmp_path / "runs.jsonl").read_text().splitlines()]
    assert [r["status"] for r in records] == ["ok"] * 5
    assert records[0]["config"]["methods"] == []
    assert {r["scores"]["accuracy"]["n"] for r in records} == {4}
    assert records[0]["config"]["attn_implementation"] == "sdpa"
    with Image.open(tmp_path / "frontier.png") as picture:
        assert picture.format == "PNG"
    samples = (tmp_path / "samples" / f"{records[1]['id']}.jsonl").read_text().splitlines()
    assert len(samples) == 4 and json.loads(samples[0])["prediction"]
    assert "5 run" in captured.err

    assert sweep(tmp_path, "--limit", "4") == 0  # again: nothing to do, the same report
    captured = capsys.readouterr()
    assert captured.out == (tmp_path / "table.md").read_text()
    assert "5 already there" in captured.err
    assert len((tmp_path / "runs.jsonl").read_text().splitlines()) == 5

    assert sweep(tmp_path, "--limit", "6") == 0  # another setting: its own table
    assert capsys.readouterr().out.count("| dense |") == 1


def test_sweep_with_a_failing_cell_exits_1_and_reports_the_rest(
    tiny, tmp_path, capsys, monkeypatch
):
    from vlmprune.prune.registry import method_class

    def broken(*_):
        raise RuntimeError("a bug in the method")

    monkeypatch.setattr(method_class("grid"), "select", broken)
    assert sweep(tmp_path) == 1
    captured = capsys.readouterr()
    assert "failed: grid(keep_ratio=0.5): RuntimeError: a bug in the method" in captured.err
    assert captured.out.count("FAILED") == 2 and captured.out.count("| fastv |") == 2
    monkeypatch.undo()


def test_sweep_of_a_method_that_lacks_its_signal_exits_0(tiny, tmp_path, capsys):
    tiny(CASES["llava-siglip-qwen2"])
    assert sweep(tmp_path, "--methods", "vtc_cls") == 0
    captured = capsys.readouterr()
    assert captured.out.count("not applicable") == 2
    assert "not applicable: vtc_cls(keep_ratio=0.5): " in captured.err and "CLS" in captured.err


def test_an_interrupted_sweep_exits_130_and_goes_on(tiny, tmp_path, capsys, monkeypatch):
    from vlmprune.prune.registry import method_class

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as during:
        during.setattr(method_class("fastv"), "select", interrupt)
        assert sweep(tmp_path) == 130
    captured = capsys.readouterr()
    assert "interrupted" in captured.err and "Traceback" not in captured.err
    assert len((tmp_path / "runs.jsonl").read_text().splitlines()) == 3
    assert sweep(tmp_path) == 0
    assert "2 run, 3 already there" in capsys.readouterr().err


def test_the_seed_reaches_methods_that_have_one(tiny, tmp_path, capsys):
    assert sweep(tmp_path, "--methods", "random", "random:seed=5", "--seed", "3") == 0
    records = [json.loads(line) for line in (tmp_path / "runs.jsonl").read_text().splitlines()]
    seeds = [m["fields"]["seed"] for r in records for m in r["config"]["methods"]]
    assert seeds == [3, 3, 5, 5]
    out = capsys.readouterr().out
    assert out.count("| random |") == 2 and out.count("| random(seed=5) |") == 2


def test_sweep_of_several_methods_at_once(tiny, tmp_path, capsys):
    assert sweep(tmp_path, "--methods", "grid@0.5+fastv:layer=2", "fastv") == 0
    records = [json.loads(line) for line in (tmp_path / "runs.jsonl").read_text().splitlines()]
    assert [r["status"] for r in records] == ["ok"] * 5
    both = records[2]
    assert [m["name"] for m in both["config"]["methods"]] == ["grid", "fastv"]
    assert both["tokens"]["per_layer"] == [18, 18, 9, 9]
    assert both["tokens"]["average_per_layer"] == 13.5
    assert both["tokens"]["average_after_cuts"] == 11.25
    assert both["positions"] and both["kv_bytes"] < records[3]["kv_bytes"]
    out = capsys.readouterr().out
    assert "| grid+fastv | 0.5+9 |" in out and "| 13.5 (11.2) |" in out
    assert (
        sweep(tmp_path, "--methods", "fastv:layer=2+grid@0.5", "fastv@9", "grid@0.5+fastv@9") == 0
    )
    assert "4 already there" in capsys.readouterr().err


def test_sweep_of_one_kind_of_questions_has_its_own_cells(tiny, tmp_path, capsys):
    assert sweep(tmp_path) == 0
    assert sweep(tmp_path, "--kinds", "long") == 0
    captured = capsys.readouterr()
    assert "5 run" in captured.err and captured.out.count("| dense |") == 2
    records = [json.loads(line) for line in (tmp_path / "runs.jsonl").read_text().splitlines()]
    assert [r["scores"]["accuracy"]["n"] for r in records] == [6] * 5 + [3] * 5
    assert "kinds" not in records[0]["config"] and records[5]["config"]["kinds"] == ["long"]
    assert sweep(tmp_path, "--kinds", "long", "--log_samples") == 0
    assert "5 already there" in capsys.readouterr().err


def test_ask_with_several_methods(tmp_path, capsys, monkeypatch):
    from vlmprune.eval.commands import comparing
    from vlmprune.eval.compare import asked
    from vlmprune.eval.compare import comparison as compare

    monkeypatch.setattr(comparing, "load", lambda *_, **__: (CLIP.model(), FakeProcessor(CLIP)))
    monkeypatch.setattr(compare.OneQuestion, "prompt", lambda self, processor, question: question)
    monkeypatch.setattr(asked, "read_asked", lambda *_: FakeTask().questions(1)[0])
    argv = ["ask", "A", "why?", "--method", "divprune@0.5+fastv:layer=2", "--keep_tokens", "3"]
    monkeypatch.setattr("vlmprune.adapters.handle.Handle.overlay", lambda *_, **__: None)
    assert cli.main(argv) == 0
    out = capsys.readouterr().out
    assert "divprune@0.5+fastv@3" in out
    (tokens,) = [line for line in out.splitlines() if line.startswith("| visual tokens |")]
    assert [part.strip() for part in tokens.split("|")[2:4]] == ["36", "3"]


@pytest.mark.parametrize("command", [["sweep"], ["ask", "embedded:3", "--method", "grid@0.5"]])
@pytest.mark.parametrize(
    ("args", "said"),
    [("max_pixel=3", "Did you mean: max_pixels"), ("max_pixels=3", "only the Qwen families")],
)
def test_wrong_model_args_are_errors(command, args, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert said in error_of(capsys, *command, "--model_args", args)

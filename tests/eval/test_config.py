"""`--config` and `--preset`: what goes before what, errors that say what is allowed, round trip."""

from __future__ import annotations

import re

import pytest
import yaml
from vlmprune.eval import cli
from vlmprune.eval.arguments import early
from vlmprune.eval.arguments.config import FILE_NAME, resolved, write_config
from vlmprune.eval.arguments.sweep import DEFAULT_METHODS, sweep_parser
from vlmprune.eval.commands import sweep as sweep_command
from vlmprune.eval.presets import preset


def flat(request) -> dict:
    """A request and the model in it as one mapping."""
    return {**vars(request.model), **vars(request)} | {"model": request.model.name}


@pytest.fixture
def calls(monkeypatch):
    """What the sweep command was asked for, in place of a sweep."""
    made: list[dict] = []
    monkeypatch.setattr(early, "find_spec", lambda name: name)  # lmms-eval may not be there
    monkeypatch.setattr(sweep_command, "run", lambda request: made.append(flat(request)) or 0)
    return made


@pytest.fixture
def sweep(calls, tmp_path, monkeypatch):
    """Runs `vlmprune sweep` on a file with this content, and gives what it asked for."""
    monkeypatch.chdir(tmp_path)

    def run(content: object = None, *argv: str) -> dict:
        if content is not None:
            text = content if isinstance(content, str) else yaml.safe_dump(content)
            (tmp_path / "my.yaml").write_text(text)
            argv = ("--config", "my.yaml", *argv)
        assert cli.main(["sweep", *argv]) == 0
        return calls[-1]

    return run


def error_of(capsys, tmp_path, content: object, *argv: str) -> str:
    path = tmp_path / "my.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    assert cli.main(["sweep", "--config", str(path), *argv]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("vlmprune sweep: error: ") and "Traceback" not in line
    return line


# --- What goes before what -------------------------------------------------------------------


def test_without_either_the_defaults_hold(sweep):
    asked = sweep()
    assert asked["limit"] == 500 and asked["methods"] == list(DEFAULT_METHODS)


def test_the_command_line_goes_before_the_file_before_the_preset_before_defaults(sweep):
    content = {"preset": "llava-1.5", "limit": 20, "budgets": [0.25, 64, "avg:48"], "seed": 3}
    asked = sweep(content, "--limit", "30", "--methods", "fastv:layer=3,grid")
    assert asked["limit"] == 30  # typed
    assert asked["methods"] == ["fastv:layer=3", "grid"]
    assert asked["budgets"] == ["0.25", "64", "avg:48"]  # the file
    assert asked["seed"] == 3
    assert asked["tasks"] == list(preset("llava-1.5").tasks)  # the preset
    assert asked["model"] == "llava-hf/llava-1.5-7b-hf"
    assert asked["clip"] == "openai/clip-vit-large-patch14-336"
    assert asked["batch_size"] == 32  # the defaults
    assert asked["dtype"] == "auto"


def test_a_flag_typed_at_its_default_still_goes_first(sweep):
    assert sweep({"limit": 20, "batch_size": 4}, "--limit", "500")["limit"] == 500
    assert sweep({"limit": 20, "batch_size": 4}, "--limit", "500")["batch_size"] == 4


def test_a_typed_preset_goes_before_the_files(sweep):
    asked = sweep({"preset": "llava-1.5"}, "--preset", "qwen2.5-vl")
    assert asked["budgets"] == ["0.333", "0.222", "0.111"]
    assert asked["settings"]["preset"] == "qwen2.5-vl"


def test_a_preset_alone(sweep):
    asked = sweep(None, "--preset", "llava-next", "--methods", "hiprune")
    assert asked["methods"] == ["hiprune"]
    assert asked["budgets"] == ["avg:640", "avg:320", "avg:160"]
    assert asked["limit"] is None


def test_one_sweep_leaves_nothing_for_the_next(sweep):
    sweep({"limit": 20, "methods": ["grid"]})
    asked = sweep()
    assert asked["limit"] == 500 and asked["methods"] == list(DEFAULT_METHODS)


def test_other_commands_know_nothing_of_it(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["bench", "model", "--config", "x.yaml"])
    assert stop.value.code == 2


# --- Values ----------------------------------------------------------------------------------


def test_values_are_what_the_command_line_takes(sweep):
    asked = sweep(
        """
        methods: divprune@0.5+fastv:layer=3, grid
        budgets: 0.25
        limit: all
        log_samples: true
        positions: repacked
        model_args: {revision: main, trust_remote_code: true, max_pixels: 1000}
        """
    )
    assert asked["methods"] == ["divprune@0.5+fastv:layer=3", "grid"]
    assert asked["budgets"] == ["0.25"]
    assert asked["limit"] is None
    assert asked["log_samples"] is True
    assert asked["positions"] == "repacked"
    assert asked["model_args"] == {
        "revision": "main",
        "trust_remote_code": True,
        "max_pixels": 1000,
    }
    assert sweep({"model_args": "revision=main,a=1"})["model_args"] == {"revision": "main", "a": 1}


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"batchsize": 4}, r"unknown key 'batchsize'\. Did you mean: batch_size\?"),
        ({"config": "other.yaml"}, r"unknown key 'config'"),
        ({3: 4}, r"unknown key 3"),
        ({"batch_size": "many"}, r"batch_size: 'many' is not a whole number of at least 1"),
        ({"batch_size": 0}, r"batch_size: '0' is not a whole number"),
        ({"batch_size": True}, r"batch_size is True: write"),
        ({"seed": 1.5}, r"seed is 1.5: write a whole number"),
        ({"seed": [1, 2]}, r"seed is \[1, 2\]: write a whole number"),
        ({"limit": None}, r"limit is None: write one N\|all"),
        ({"limit": "some"}, r"neither a number of questions \(at least 1\) nor all"),
        ({"dtype": "int8"}, r"dtype is 'int8': write one of auto, float32, bfloat16, float16"),
        ({"log_samples": "yes"}, r"log_samples is 'yes': write true or false"),
        ({"methods": []}, r"methods is empty: write one NAME or a list"),
        ({"methods": {"fastv": 3}}, r"methods is \{'fastv': 3\}: write one NAME or a list"),
        ({"methods": ["grid", ["fastv"]]}, r"methods is \['fastv'\]: write one NAME or a list"),
        ({"model_args": {"a": "1,2"}}, r"model_args: '1,2' is not possible"),
        ({"model_args": {"a": [1]}}, r"model_args: \[1\] is not possible"),
        ({"preset": "llava"}, r"Unknown preset 'llava'\. Did you mean: llava-1.5, llava-next"),
        ("limit: 3\nseed: 1\nlimit: 4", r"'limit' is there twice.*line 3"),
        ("? [limit]\n: 3", r"is not valid YAML.*unhashable"),
        ("limit: [3", r"is not valid YAML"),
        ("", r"holds nothing: write flags"),
        ("- limit", r"holds a list: write flags"),
    ],
)
def test_what_means_nothing_is_refused_with_what_is_allowed(capsys, tmp_path, content, expected):
    line = error_of(capsys, tmp_path, content)
    assert re.search(expected, line), line
    assert "my.yaml" in line or "preset" in line


def test_a_missing_file_is_named(capsys):
    assert cli.main(["sweep", "--config", "nowhere.yaml"]) == 2
    assert "'nowhere.yaml' cannot be read" in capsys.readouterr().err


# --- The file beside the results -------------------------------------------------------------


@pytest.mark.parametrize(
    "argv",
    [
        (),
        ("--preset", "llava-1.5"),
        ("--preset", "qwen2.5-vl", "--methods", "grid", "fastv:layer=3,divprune@0.5+fastv"),
        ("--limit", "all", "--kinds", "read", "-s", "--device", "cpu", "--positions", "repacked"),
        ("--model_args", "revision=main,max_pixels=1000", "--seed", "7", "-o", "elsewhere"),
    ],
)
def test_the_written_file_repeats_the_sweep(calls, tmp_path, monkeypatch, argv):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["sweep", *argv]) == 0
    path = write_config(tmp_path, calls[-1]["settings"])
    assert cli.main(["sweep", "--config", str(path)]) == 0
    first, second = calls
    assert first == second
    assert path.name == FILE_NAME and [p.name for p in tmp_path.iterdir()] == [FILE_NAME]


def test_all_settings_are_in_the_file_and_nothing_else():
    args = cli.build_parser().parse_args(["sweep", "--verbosity", "debug"])
    settings = resolved(sweep_parser(), args)
    assert settings["limit"] == 500 and settings["model"] == "embedded"
    assert not {"config", "verbosity", "help", "run", "device"} & set(settings)


def test_a_sweep_writes_it_before_anything_else(tmp_path, capsys):
    folder = tmp_path / "runs"
    argv = ["sweep", "--methods", "grid", "--budgets", "0.5", "--model", "no/such/model"]
    assert cli.main([*argv, "-o", str(folder), "--device", "cpu"]) != 0
    capsys.readouterr()
    written = yaml.safe_load((folder / FILE_NAME).read_text())
    assert written["methods"] == ["grid"] and written["model"] == "no/such/model"


def test_a_second_sweep_keeps_the_configuration_of_the_first(tmp_path):
    for limit in (10, 20, 20, 30):
        write_config(tmp_path, {"methods": ["grid"], "limit": limit})
    found = {p.name: yaml.safe_load(p.read_text())["limit"] for p in tmp_path.iterdir()}
    assert found == {"sweep.yaml": 30, "sweep-1.yaml": 10, "sweep-2.yaml": 20}

"""The command of a cell measures that cell: what it says, read back, has the cell's id."""

from __future__ import annotations

import dataclasses
import json
import shlex

import pytest
from kit.paths import STORED
from kit.reports import record
from PIL import Image
from vlmprune.eval import cli
from vlmprune.eval.report.repeat import command_of, needs
from vlmprune.eval.results.records import Config, method_record
from vlmprune.eval.results.store import read_records
from vlmprune.eval.words.downsample import class_of
from vlmprune.eval.words.parts import grid, parse, parse_budgets
from vlmprune.eval.words.typed import parse_fields, split_list
from vlmprune.prune import registry

pytestmark = pytest.mark.usefixtures("timed_once")


def read_back(command: str, config: dict) -> list[Config]:
    """The configurations of a command's grid; what only a run can tell is taken from `config`."""
    words = shlex.split(command)
    args = cli.build_parser().parse_args(words[words.index("sweep") :])
    seed = args.seed
    cells = grid(
        [parse(word, seed) for word in split_list(args.methods) if word != "dense"],
        parse_budgets(split_list(args.budgets)),
    )
    base = Config(**config)
    return [
        dataclasses.replace(
            base,
            methods=tuple(map(method_record, parts)),
            model=args.model,
            task=split_list(args.tasks)[0],
            limit=args.limit,
            seed=seed,
            dtype=args.dtype,
            attn_implementation=args.attn_implementation,
            positions=args.positions,
            kinds=tuple(sorted(split_list(args.kinds))) if args.kinds else None,
            model_args=parse_fields(split_list([args.model_args or ""])) or None,
        )
        for parts in cells
    ]


def assert_repeats(one: dict) -> None:
    config = Config(**one["config"])
    dense, *pruned = read_back(command_of(one), one["config"])
    (cell,) = pruned or [dense]
    assert cell.id == config.id, command_of(one)
    assert needs(one) == []


def gained(one: dict) -> set[str]:
    """Fields that methods have today and had not when a cell was measured."""
    return {
        name
        for entry in one["config"]["methods"]
        for cls in [class_of(entry["name"])]
        for name in cls().fields().keys() - entry["fields"].keys() - cls.gained.keys()
    }


def of(word: str, budget: str = "published", **changed) -> dict:
    """A record of a method, in a configuration with everything that flags can set."""
    one = record(1)
    seed = changed.get("seed", 0)
    (parts,) = grid([parse(word, seed)], parse_budgets([budget]))[1:]
    one["config"] |= {"model": "org/m", "task": "tinyscenes"} | changed
    one["config"]["methods"] = [method_record(part) for part in parts]
    one["config"] = json.loads(json.dumps(one["config"]))
    one["id"] = Config(**one["config"]).id
    return one


@pytest.mark.parametrize("file", sorted(path.name for path in STORED.glob("sweep*.jsonl")))
def test_stored_cells_have_commands_that_measure_them(file):
    for one in read_records(STORED / file):
        if not (added := gained(one)):
            assert_repeats(one)
            continue
        (said,) = needs(one)  # a later vlmprune gave the method a field
        assert all(name in said for name in added)
        (_, repeated) = read_back(command_of(one), one["config"])
        for now, then in zip(repeated.methods, one["config"]["methods"], strict=True):
            kept = {k: v for k, v in now["fields"].items() if k in then["fields"]}
            assert (kept, now["budget"]) == (then["fields"], then["budget"])


@pytest.mark.parametrize(
    ("word", "changed"),
    [
        ("divprune@0.33333333333333331", {}),  # more digits than are shown
        ("divprune@avg:64.12345678", {"limit": None}),
        ("fastv@flops:0.123456789", {"positions": "original", "dtype": "bfloat16"}),
        ("random@1e-07", {"seed": 7}),
        ("random:seed=3@0.5", {"seed": 7}),
        ("random:seed=0@64", {"seed": 7}),
        ("random@1.0", {}),
        ("fopru:strategy=row:axis=given@0.5", {}),
        ("pyramiddrop:layers=[1,2]:ratios=[0.5,0.25]@0.25", {}),
        ("divprune@0.5+fastv:layer=3@0.25", {"kinds": ["read", "what color"]}),
        ("prumerge@published", {"attn_implementation": "eager"}),
        ("todre:late=False@12", {"model_args": {"trust_remote_code": True, "max_pixels": 64}}),
        ("grid@9", {"model_args": {"revision": "1e5"}}),  # a text that looks like a number
    ],
)
def test_every_flag_that_a_cell_hangs_on_is_there(word, changed):
    assert_repeats(of(word, **changed))


def test_what_a_command_cannot_hold_is_said():
    own = of("grid@0.5")
    own["config"]["methods"][0] |= {"name": "mine", "source": "abc"}
    assert "the code whose hash was abc" in " ".join(needs(own))
    older = of("grid@0.5")
    older["config"]["methods"][0]["version"] = 0
    assert "version 0" in " ".join(needs(older))
    assert "--clip" in " ".join(needs(of("cdpruner@0.5")))
    assert "folder of local" in " ".join(needs(of("grid@0.5", model="local")))
    said = " ".join(needs(of("grid@0.5", task="mine", task_version="7")))
    assert "mine, version 7" in said and "--data" in said


def test_a_method_of_a_file_is_imported_again(tmp_path, monkeypatch):
    monkeypatch.setattr(registry, "_classes", dict(registry._classes))
    file, runs = tmp_path / "mine_again.py", tmp_path / "runs"
    file.write_text(
        "from vlmprune.prune.methods.before_llm.grid import Grid\n"
        "from vlmprune.prune.registry import register\n\n\n"
        '@register("mine_again")\nclass Mine(Grid):\n    """Mine: keep what a grid keeps."""\n',
        encoding="utf-8",
    )
    argv = ["sweep", "--import", str(file), "--methods", "mine_again", "--budgets", "0.5"]
    assert cli.main([*argv, "--limit", "1", "--device", "cpu", "-o", str(runs)]) == 0
    dense, mine = read_records(runs)
    assert "--import" not in command_of(dense)
    assert f"--import {file}" in command_of(mine)
    (need,) = needs(mine)
    assert "your own mine_again" in need and mine["config"]["methods"][0]["source"] in need
    assert cli.main([*shlex.split(command_of(mine))[1:-1], str(runs)]) == 0
    assert len((runs / "runs.jsonl").read_text().splitlines()) == 2


def test_a_real_sweep_is_found_again_by_its_commands(tmp_path, capsys):
    """Questions of a file: the command has all flags, and finds every cell in its place."""
    Image.new("RGB", (32, 32), "red").save(tmp_path / "a.png")
    lines = [{"image": "a.png", "question": f"color {n}", "answer": "red"} for n in range(2)]
    data = tmp_path / "my data.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    runs = tmp_path / "runs"
    argv = ["sweep", "--data", str(data), "--matching", "contains", "--max_new_tokens", "2"]
    argv += ["--methods", "grid@0.3333333333", "fastv", "--budgets", "0.5", "-o", str(runs)]
    assert cli.main([*argv, "--device", "cpu"]) == 0
    records = read_records(runs)
    assert [one["status"] for one in records] == ["ok"] * 3
    for one in records:
        words = shlex.split(command_of(one))
        capsys.readouterr()
        assert cli.main([*words[1:-1], str(runs)]) == 0
        assert needs(one)[0].startswith(f"questions: {data}")
    assert [one["finished"] for one in read_records(runs)] == [one["finished"] for one in records]
    assert len((runs / "runs.jsonl").read_text().splitlines()) == 3  # nothing ran again

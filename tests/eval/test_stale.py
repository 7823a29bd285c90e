"""Results are never stale: what decides a cell's outcome is part of its id."""

from __future__ import annotations

import ast
import importlib
import json
import linecache
import logging
import re
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from unittest.mock import ANY

import numpy as np
import pytest
from kit import sweeps, zoo
from kit.fakes import FakeProcessor, FakeTask
from PIL import Image
from vlmprune.eval import embedded
from vlmprune.eval.content_hash import content_hash
from vlmprune.eval.embedded.task import EmbeddedTask
from vlmprune.eval.in_process import sweep_model
from vlmprune.eval.report import markdown
from vlmprune.eval.report.cells import read_cells, sections
from vlmprune.eval.results.records import Record, main_score, method_record
from vlmprune.eval.results.store import Store, read_records
from vlmprune.eval.results.sweep_table import sweep_table
from vlmprune.eval.sources import UNKNOWN, Source
from vlmprune.eval.tasks.version import questions_hash, version_of
from vlmprune.eval.words.parts import parse
from vlmprune.prune import registry
from vlmprune.prune.shipped import VERSIONS, shipped

# --- What is asked ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Quiz:
    """A question of an own task, with a field that only the task knows."""

    id: int = 0
    kind: str = "color"
    question: str = "which color ?"
    answer: str = "red"
    image: Image.Image = field(default_factory=lambda: Image.new("RGB", (8, 8), "red"))
    answers: tuple[str, ...] = ("red", "crimson")


@pytest.mark.parametrize(
    "change",
    [
        {"id": 1},
        {"kind": "shape"},
        {"question": "what color ?"},
        {"answer": "blue"},
        {"answers": ("red",)},
        {"image": Image.new("RGB", (8, 8), "blue")},
        {"image": Image.new("RGB", (4, 16), "red")},
    ],
)
def test_whatever_a_question_says_or_shows_changes_the_hash(change):
    assert questions_hash([Quiz()]) == questions_hash([Quiz()])
    assert questions_hash([replace(Quiz(), **change)]) != questions_hash([Quiz()])
    assert questions_hash([Quiz(), Quiz()]) != questions_hash([Quiz()])


def test_a_hash_knows_values_apart_and_files_by_what_they_hold(tmp_path):
    values = [None, 0, False, "", "0", b"0", [], {}, ("a", "b"), ("ab",), (("a",), "b"), {"a": 1}]
    assert len({content_hash(value) for value in values}) == len(values)
    assert content_hash("a", "b") != content_hash("ab")
    assert content_hash({"a": 1, "b": 2}) == content_hash({"b": 2, "a": 1})
    for name, text in (("one", "same"), ("two", "same"), ("three", "other")):
        (tmp_path / name).write_text(text)
    one, two, three = (content_hash(Path(tmp_path / n)) for n in ("one", "two", "three"))
    assert one == two != three
    assert content_hash(np.arange(2)) == content_hash([0, 1]) and content_hash(np.int64(3))
    with pytest.raises(TypeError, match="no hash of object"):
        content_hash(object())


class Own:
    """A task of the user's."""

    name, version, max_new_tokens = "quiz", "1", 4

    def __init__(self, exact: bool = True) -> None:
        self.exact = exact


def test_an_own_task_is_another_one_with_other_questions_or_settings():
    first = version_of(Own(), [Quiz()])
    assert re.fullmatch(r"1-[0-9a-f]{12}", first) and version_of(Own(), [Quiz()]) == first
    others = {version_of(Own(), [Quiz(answer="blue")]), version_of(Own(exact=False), [Quiz()])}
    assert first not in others and len(others) == 2
    shipped = EmbeddedTask()
    assert version_of(shipped, shipped.questions(2)) == embedded.TASK_VERSION == "1"


# --- The code of a method --------------------------------------------------------------------

METHOD = """
from dataclasses import dataclass
import torch
from vlmprune.prune.contract import BeforeLLM, Selection
from vlmprune.prune.registry import register
{more}

@register("own")
@dataclass(frozen=True, kw_only=True)
class Own(BeforeLLM):
    step: int = 1

    def needs(self, shape):
        return ()

    def select(self, tokens, keep):
        return Selection(kept={kept})
"""
FIRST, LAST = "torch.arange(keep)", "torch.arange(tokens.num_tokens - keep, tokens.num_tokens)"


@pytest.fixture
def own(monkeypatch, tmp_path):
    """Writes modules of a user and imports them, anew if they were imported before."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # edits within a second would be missed
    names: set[str] = set()

    def write(name: str, text: str, load: bool = True):
        (tmp_path / f"{name}.py").write_text(text)
        if not load:
            return None
        registry._classes.pop("own", None)
        names.add(name)
        importlib.invalidate_caches()
        for known in names:
            sys.modules.pop(known, None)
        return importlib.import_module(name)

    yield write
    registry._classes.pop("own", None)
    for name in names:
        sys.modules.pop(name, None)


def test_an_edited_file_is_another_method(own):
    first = Source(own("mine", METHOD.format(more="", kept=FIRST)).Own)
    again = Source(own("mine", METHOD.format(more="", kept=FIRST)).Own)
    other = Source(own("mine", METHOD.format(more="", kept=LAST)).Own)
    assert not first.gaps and not other.gaps
    assert first.hash == again.hash != other.hash
    assert method_record(parse("own@0.5")[0])["source"] == other.hash


@pytest.mark.parametrize(
    "more",
    ["from helpers import SCALE", "import helpers", "def f():\n    from helpers import SCALE"],
)
def test_a_module_that_it_imports_counts_too(own, tmp_path, more):
    own("helpers", "SCALE = 0")
    cls = own("mine", METHOD.format(more=more, kept=FIRST)).Own
    hashes = []
    for scale in (1, 2, 1):
        (tmp_path / "helpers.py").write_text(f"SCALE = {scale}\n")
        importlib.import_module("helpers")
        hashes.append(Source(cls).hash)
    assert hashes[0] == hashes[2] != hashes[1] and UNKNOWN not in hashes


def test_a_file_that_was_edited_behind_the_back_of_python_is_not_trusted(own):
    """Another code is loaded than the file has: neither hash would be right."""
    cls = own("mine", METHOD.format(more="", kept=FIRST)).Own
    own("mine", METHOD.format(more="# a remark", kept=FIRST), load=False)
    assert Source(cls).hash not in (None, UNKNOWN)  # the same code
    own("mine", METHOD.format(more="", kept=LAST), load=False)
    assert Source(cls).hash == UNKNOWN
    assert "imported again" in Source(cls).gaps[0]


class Notebook:
    """Runs cells as a notebook does: in one namespace, each with a source of its own."""

    def __init__(self) -> None:
        self.names: dict = {"__name__": "a notebook"}

    def __call__(self, text: str) -> type:
        registry._classes.pop("own", None)
        file = f"<cell {len(linecache.cache)}>"
        linecache.cache[file] = (len(text), None, text.splitlines(keepends=True), file)
        for statement in ast.parse(text).body:
            exec(compile(ast.Module([statement], []), file, "exec", dont_inherit=True), self.names)
        return self.names.get("Own")


def test_in_a_notebook_all_that_a_method_refers_to_counts(own):
    cell = Notebook()
    cell("SCALE = 2\ndef helper(n):\n    return n * SCALE")
    cls = cell(METHOD.format(more="", kept="torch.arange(helper(keep))"))
    seen = [Source(cls).hash]
    assert not Source(cls).gaps
    cell("unrelated = 3")
    assert Source(cls).hash == seen[0]
    for text in (
        "SCALE = 3",
        "def helper(n):\n    return n * SCALE + 0",
        METHOD.format(more="", kept="torch.arange(helper(keep)) + 0"),
    ):
        seen.append(Source(cell(text)).hash)
    assert len(set(seen)) == 4 and UNKNOWN not in seen
    names, cell.names["helper"] = cell.names["helper"], len
    assert Source(cls).hash not in (UNKNOWN, *seen)
    cell.names["helper"] = object()
    assert Source(cls).gaps == ["it reads helper, and nobody knows what is in a object"]
    cell.names["helper"] = names


def test_in_a_notebook_a_cell_may_import_what_its_method_calls(own):
    cls = Notebook()("import torch\n" + METHOD.format(more="", kept="torch.arange(keep)"))
    assert Source(cls).gaps == [] and Source(cls).hash != UNKNOWN


def test_values_that_a_definition_closes_over_count(own):
    def make(scale: int) -> type:
        class Made(sweeps.Cached):
            share = scale

            def needs(self, shape):
                return (scale,)

        return Made

    assert Source(make(1)).hash == Source(make(1)).hash != Source(make(2)).hash


def test_bases_count_shipped_ones_by_their_version(own, monkeypatch):
    text = (
        "from vlmprune.prune.methods.before_llm.grid import Grid\n"
        "class Finer(Grid):\n    name = 'finer'\n"
    )
    cls = own("mine", text).Finer
    before = Source(cls).hash
    assert before not in (None, UNKNOWN)
    monkeypatch.setitem(VERSIONS, "grid", 2)
    assert Source(cls).hash != before


def test_what_has_no_source_is_never_skipped_and_says_so(tmp_path, own, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("vlmprune"), "propagate", True)
    text = compile(METHOD.format(more="", kept=FIRST), "<string>", "exec", dont_inherit=True)
    exec(text, {"__name__": "nowhere"})
    for _ in range(2):
        runner = sweeps.Runner()
        sweeps.go(sweeps.cells("own", budgets=["0.5"]), runner, tmp_path)
        assert "own(keep_ratio=0.5)" in runner.ran
    assert "method own: nobody can tell" in caplog.text and "write it to a file" in caplog.text
    assert runner.ran == ["own(keep_ratio=0.5)"]  # the dense model is known


# --- The code of shipped methods -------------------------------------------------------------


def test_every_shipped_method_has_a_version_and_no_source():
    assert VERSIONS.keys() == shipped().keys()
    for name in VERSIONS:
        source = Source(registry.method_class(name))
        assert source.hash is None and not source.gaps, name


def test_a_version_above_one_is_another_cell(monkeypatch):
    (cell,) = sweeps.cells("grid", budgets=["0.5"])[1:]
    assert "version" not in cell.config.as_json()["methods"][0]
    monkeypatch.setitem(VERSIONS, "grid", 2)
    (newer,) = sweeps.cells("grid", budgets=["0.5"])[1:]
    assert newer.config.as_json()["methods"][0]["version"] == 2
    assert newer.config.id != cell.config.id


def test_a_file_in_the_package_without_a_version_counts_by_its_source(monkeypatch):
    """As somebody writes a method who works in a clone."""
    monkeypatch.delitem(VERSIONS, "divprune")
    record = method_record(parse("divprune@0.5")[0])
    assert re.fullmatch("[0-9a-f]{12}", record["source"])


# --- Two codes of one method in a folder ------------------------------------------------------


def edited(tmp_path: Path, own) -> tuple[Path, list[str]]:
    """A folder in which a method was measured, edited, and measured again; the ids of both."""
    ids = []
    for share, kept in ((0.5, FIRST), (0.25, LAST)):
        own("mine", METHOD.format(more="", kept=kept))
        grid = sweeps.cells("own", "grid", budgets=["0.5"])
        runner = lambda cell, share=share: sweeps.measured(share=share)  # noqa: E731
        sweeps.go(grid, runner, tmp_path)
        ids.append(grid[1].config.id)
    return tmp_path, ids


def test_tables_show_the_code_that_was_used_last_and_say_so(tmp_path, own):
    folder, (first, last) = edited(tmp_path, own)
    everything = Store(folder).read()
    assert [r["id"] for r in everything if r["id"] in (first, last)] == [first, last]
    for records in (everything, read_records(folder)):
        table = sweep_table(records)
        assert [row[0] for row in table.rows] == ["dense", "own", "grid"]
        assert table.rows[1][table.headers.index("Share %")] == "25.0"
        assert "another version of the method, not shown: own (1 cell)" in table.notes
    assert "not shown" not in sweep_table([r for r in everything if r["id"] != last]).notes
    (section,) = sections(read_cells([folder]))
    assert [cell.record["id"] for cell in section.cells if cell.variant == "own"] == [last]
    assert section.earlier == "measured with another version of the method, not shown: own (1 cell)"
    assert section.earlier in markdown.render([section])


def test_an_edit_that_is_taken_back_shows_the_old_cell_again(tmp_path, own):
    folder, (first, last) = edited(tmp_path, own)
    own("mine", METHOD.format(more="", kept=FIRST))
    runner = sweeps.Runner()
    sweeps.go(sweeps.cells("own", budgets=["0.5"]), runner, folder)
    assert not runner.ran
    assert {first} == {r["id"] for r in read_records(folder)} & {first, last}
    for record in Store(folder).read():
        if record["id"] == first:
            assert record["finished"] <= record["asked"]


def test_results_of_before_sources_were_recorded_give_way(tmp_path, own):
    folder, (first, _) = edited(tmp_path, own)
    file = folder / "runs.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    del lines[1]["config"]["methods"][0]["source"]
    lines[1]["id"] = "0" * 16
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    own("mine", METHOD.format(more="", kept=FIRST))
    runner = sweeps.Runner()
    sweeps.go(sweeps.cells("own", budgets=["0.5"]), runner, folder)
    assert runner.ran == ["own(keep_ratio=0.5)"]
    assert first in {r["id"] for r in read_records(folder)}
    assert len(sweep_table(read_records(folder)).rows) == 3


def test_a_rerun_that_fails_does_not_hide_what_was_measured(tmp_path):
    grid = sweeps.cells("grid", budgets=["0.5"])
    sweeps.go(grid, sweeps.Runner(), tmp_path)
    failing = sweeps.Runner(grid=RuntimeError("no memory"))
    assert sweeps.go(grid, failing, tmp_path, rerun=True).failed
    assert [r["status"] for r in Store(tmp_path).read()] == ["ok", "ok"]


# --- Sweeps ----------------------------------------------------------------------------------


def test_what_is_skipped_is_said_and_a_rerun_measures_it(tmp_path):
    grid = sweeps.cells("grid", budgets=["0.5"])
    versions = {"vlmprune": "0.1.0", "torch": "2.14.1", "numpy": "2"}
    sweeps.go(grid, sweeps.Runner(), tmp_path, versions)
    summary = sweeps.go(grid, sweeps.Runner(), tmp_path, versions)
    (line,) = summary.skipped_lines()
    said = r"skipped: dense, grid\(keep_ratio=0.5\), measured 2\d{3}-\d\d-\d\d with vlmprune "
    assert re.fullmatch(said + r"0\.1\.0, torch 2\.14\.1", line)
    again = sweeps.Runner()
    assert not sweeps.go(grid, again, tmp_path, versions, rerun=True).skipped
    assert again.ran == ["dense", "grid(keep_ratio=0.5)"]
    many = sweeps.cells("grid", "random")
    sweeps.go(many, sweeps.Runner(), tmp_path, versions)
    summary = sweeps.go(many, sweeps.Runner(), tmp_path, versions)
    assert summary.skipped_lines()[0].startswith("skipped: 5 cells, measured 2")


def test_an_edited_method_and_another_task_of_the_same_name_are_measured(own, tmp_path, capsys):
    """As a user meets it: edit, import again, sweep again into the same folder."""
    case = zoo.CASES["llava-clip-llama"]
    model, processor = case.model(), FakeProcessor(case)

    def swept(answer: str = "") -> Record:
        options = {"limit": 2, "task": FakeTask([answer] * 6), "output_path": tmp_path / "runs"}
        return sweep_model(model, processor, ["own"], [6], **options)[1]

    own("mine", METHOD.format(more="", kept=FIRST))
    first = swept()
    assert "skipped" not in capsys.readouterr().err
    own("mine", METHOD.format(more="", kept=LAST))
    last = swept()
    assert "skipped: dense, measured" in capsys.readouterr().err
    predictions = [[e["prediction"] for e in r["examples"]] for r in (first, last)]
    assert first["id"] != last["id"] and predictions[0] != predictions[1]
    own("mine", METHOD.format(more="", kept=FIRST))
    assert swept() == first | {"asked": ANY}
    assert main_score(swept(predictions[0][0]))[1]["value"] > main_score(first)[1]["value"] == 0

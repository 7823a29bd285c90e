"""A disk that is full, a path that takes nothing: one line, and nothing computed is lost."""

from __future__ import annotations

import errno
import json
import logging
import os
import resource
from contextlib import contextmanager

import pytest
from kit import sweeps, zoo
from kit.fakes import FakeProcessor, FakeTask
from vlmprune.eval import cli
from vlmprune.eval.commands import sweep as sweep_command
from vlmprune.eval.in_process import sweep_model
from vlmprune.eval.measure.evaluate import Evaluator
from vlmprune.eval.results.store import Store, UnwrittenError
from vlmprune.eval.sweep.request import SweepRequest
from vlmprune.eval.sweep.running import sweep_grid
from vlmprune.eval.words.parts import grid, parse, parse_budgets

pytestmark = pytest.mark.usefixtures("timed_once")


def heard_once(monkeypatch):
    """Our log lines go to pytest alone, whatever commands of other tests have set up."""
    logger = logging.getLogger("vlmprune")
    monkeypatch.setattr(logger, "propagate", True)
    monkeypatch.setattr(logger, "handlers", [])


@contextmanager
def room(bytes_a_file: int):
    """The system takes no more of any file, as a full disk does, in the middle of a write."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_a_file, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_cell_that_the_disk_does_not_take_leaves_the_file_whole_and_is_in_the_error(tmp_path):
    sweeps.go(sweeps.cells("grid", budgets=["0.5"]), sweeps.Runner(), tmp_path)
    file = tmp_path / "runs.jsonl"
    before = file.read_bytes()
    more = sweeps.cells("divprune", budgets=["0.5"])
    with room(len(before) + 100), pytest.raises(UnwrittenError, match="make room") as raised:
        sweeps.go(more, sweeps.Runner(), tmp_path)
    assert file.read_bytes() == before
    assert raised.value.record["status"] == "ok" and "\n" not in str(raised.value)
    assert len(sweeps.go(more, sweeps.Runner(), tmp_path).ok) == 1  # there is room again


def test_pictures_that_cannot_be_written_undo_no_cell(tmp_path, caplog, monkeypatch):
    heard_once(monkeypatch)
    (tmp_path / "pictures").write_text("a file where a folder should be")
    case = zoo.CASES["llava-clip-llama"]
    options = {"limit": 2, "task": FakeTask(), "output_path": tmp_path}
    records = sweep_model(case.model(), FakeProcessor(case), ["grid"], [6], **options)
    assert [r["status"] for r in records] == ["ok", "ok"]
    assert all(example["picture"] is None for r in records for example in r["examples"])
    assert caplog.text.count("pictures cannot be written") == 1


def test_samples_that_do_not_fit_leave_no_half_a_file(tmp_path, caplog, monkeypatch):
    heard_once(monkeypatch)
    case, task = zoo.CASES["llava-clip-llama"], FakeTask()
    model = case.model()
    evaluator = Evaluator(model, FakeProcessor(case), task, task.questions(2), batch_size=2)
    request = SweepRequest(
        methods=["grid"],
        budgets=[6],
        limit=2,
        batch_size=2,
        output_path=tmp_path,
        log_samples=True,
    )
    (folder := tmp_path / "samples").mkdir()
    with room(20):
        _, summary = sweep_grid(
            model,
            [evaluator],
            grid([parse("grid")], parse_budgets(["6"])),
            request,
            name="m",
            store=None,
        )
    assert len(summary.ok) == 2 and list(folder.iterdir()) == []
    assert caplog.text.count("samples cannot be written") == 1


@pytest.fixture
def answered(monkeypatch):
    """The command runs its grid at once, without a model."""

    def instead(model, benchmarks, combinations, request, *, store, **_):
        cells = sweeps.cells("grid", budgets=["0.5"])
        return cells, sweeps.go(cells, sweeps.Runner(), request.output_path)

    monkeypatch.setattr(sweep_command, "sweep_grid", instead)
    monkeypatch.setattr(sweep_command, "load", lambda *_, **__: (None, None))
    monkeypatch.setattr(sweep_command, "benchmarks_of", lambda *_, **__: [])


def argv(folder) -> list[str]:
    return ["sweep", "--methods", "grid", "--budgets", "0.5", "-o", str(folder)]


def test_the_command_prints_what_it_measured_and_one_line(tmp_path, answered, capsys, monkeypatch):
    real, calls = os.fsync, []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) > 1:  # the dense cell has still got room
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    assert cli.main(argv(tmp_path)) == 2
    captured = capsys.readouterr()
    assert "| dense |" in captured.out and "| grid | 0.5 |" in captured.out
    (line,) = captured.err.splitlines()
    assert "runs.jsonl cannot be written (No space left on device)" in line
    assert len((tmp_path / "runs.jsonl").read_text().splitlines()) == 1
    monkeypatch.setattr(os, "fsync", real)
    assert cli.main(argv(tmp_path)) == 0
    assert [r["status"] for r in Store(tmp_path).read()] == ["ok", "ok"]


def test_a_table_or_picture_that_cannot_be_written_is_said_and_the_table_printed(
    tmp_path, answered, capsys
):
    for name in ("table.md", "frontier.png"):
        (tmp_path / name).mkdir()
    assert cli.main(argv(tmp_path)) == 0
    captured = capsys.readouterr()
    assert "| grid | 0.5 |" in captured.out
    assert "tables cannot be written" in captured.err and "pictures cannot" in captured.err
    assert json.loads((tmp_path / "runs.jsonl").read_text().splitlines()[0])["status"] == "ok"


def test_a_configuration_that_cannot_be_written_is_one_line(tmp_path, answered, capsys):
    (tmp_path / "sweep.yaml").mkdir()
    assert cli.main(argv(tmp_path)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "sweep.yaml cannot be written" in line and "--output_path" in line

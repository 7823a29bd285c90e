"""Sweeps that are killed at any moment lose at most the cell that was running."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from functools import cache, partial
from itertools import count
from pathlib import Path

import pytest
from kit import skips
from kit.forked import exit_code, forked
from kit.sweeps import BASE, HARDWARE, VERSIONS, cells, measured
from vlmprune.eval import cli
from vlmprune.eval.results.store import FILE_NAME, Store, read_records
from vlmprune.eval.sweep.grid import Cell, sweep

pytestmark = pytest.mark.usefixtures("timed_once")

KILLS = 20
fork = skips.needs("fork")


@cache
def many_cells() -> list[Cell]:
    return cells("grid", "random", budgets=tuple(str(n) for n in range(1, 101)))


def waiting_sweep(folder: Path, log: Path, most: int | None) -> None:
    """With a cell runner that only waits: from cell `most` on for the kill."""
    with open(log, "a") as started:
        numbers = count()

        def run(cell: Cell) -> dict:
            started.write(f"{cell.config.id}\n")
            started.flush()
            time.sleep(60 if next(numbers) == most else 0.0005)
            return measured("10" * 250)  # a long line

        sweep(many_cells(), run, Store(folder), batch_size=1, versions=VERSIONS, hardware=HARDWARE)


@fork
def test_kills_lose_at_most_the_running_cell(tmp_path):
    draw = random.Random(0)
    log, finished, runs = tmp_path / "log", [], tmp_path / "runs"
    todo = {cell.config.id for cell in many_cells()}
    for kills in (*[True] * KILLS, False):
        log.write_text("")
        child = forked(partial(waiting_sweep, runs, log, 8 if kills else None))
        if kills:
            deadline = time.monotonic() + 60
            while not log.read_text() and time.monotonic() < deadline:  # it has to get somewhere
                time.sleep(0.001)
            time.sleep(draw.uniform(0, 0.004))
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status) is kills
        records = Store(runs).read()
        ids = [record["id"] for record in records]
        assert ids[: len(finished)] == finished  # nothing that was there is lost
        started = log.read_text().split()
        assert not set(started) & set(finished)  # nor run again
        assert set(started[:-1]) <= set(ids)  # only the last one may be missing
        assert all(len(r["scores"]["accuracy"]["outcomes"]) == 500 for r in records)
        finished = ids
    assert set(finished) == todo
    lines = (runs / FILE_NAME).read_bytes().splitlines()
    whole = [json.loads(line) for line in lines if line.endswith(b"}")]
    assert len({record["id"] for record in whole}) == len(todo)


COMMAND = [
    *("sweep", "--limit", "3", "--methods", "grid"),
    *("--budgets", "0.7", "0.5", "0.3", "--log_samples", "-o"),
]


def outcomes(folder: Path) -> dict[str, list[float]]:
    return {r["id"]: r["scores"]["accuracy"]["outcomes"] for r in read_records(folder)}


@fork
def test_a_real_sweep_goes_on_after_a_kill(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torn, whole = tmp_path / "torn", tmp_path / "whole"
    file = torn / FILE_NAME
    process = forked(lambda: cli.main([*COMMAND, str(torn)]), tmp_path / "said.txt")
    deadline = time.monotonic() + 300
    while not file.exists() or file.read_bytes().count(b"\n") < 2:
        assert not os.waitpid(process, os.WNOHANG)[0] and time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process, signal.SIGKILL)
    assert exit_code(process) == -signal.SIGKILL
    assert 2 <= (before := len(outcomes(torn))) < 4
    for folder in (torn, whole):
        assert cli.main([*COMMAND, str(folder)]) == 0
    assert f"{before} already there" in capsys.readouterr().err
    assert outcomes(torn) == outcomes(whole)
    assert len(outcomes(whole)) == 4 and BASE.task
    for record in read_records(torn):
        assert (torn / "samples" / f"{record['id']}.jsonl").read_text().count("\n") == 3
        assert all((torn / example["picture"]).is_file() for example in record["examples"])

"""Several processes share a sweep: equal results, and under torchrun errors that end all."""

from __future__ import annotations

import pytest
from kit import skips
from kit.forked import together
from kit.torchrun import WORLD, torchrun
from vlmprune.eval import cli
from vlmprune.eval.processes import Processes
from vlmprune.eval.results.store import read_records


@skips.needs("fork")
@pytest.mark.usefixtures("timed_once")
def test_two_processes_answer_as_one_does(tmp_path, monkeypatch):
    """Forked with torchrun's variables; under torchrun itself: the next test, and test_lmms."""
    monkeypatch.chdir(tmp_path)
    words = ["sweep", "--limit", "5", "--methods", "fastv", "--budgets", "0.25", "-s", "-b", "2"]
    codes, said = together(lambda: cli.main([*words, "-o", "two"]), WORLD, tmp_path)
    assert codes == [0] * WORLD, said
    assert "".join(said).count("| dense |") == 1  # one of them reports
    assert cli.main([*words, "-o", "one"]) == 0
    one, two = (read_records(tmp_path / name) for name in ("one", "two"))
    assert len(one) == len(two) == 2
    for a, b in zip(one, two, strict=True):
        assert b["hardware"]["processes"] == WORLD and "processes" not in a["hardware"]
        for key in ("id", "scores", "tokens", "flops", "kv_bytes", "examples"):
            assert a[key] == pytest.approx(b[key]) if key == "kv_bytes" else a[key] == b[key]
        samples = [tmp_path / name / "samples" / f"{a['id']}.jsonl" for name in ("one", "two")]
        assert samples[0].read_text() == samples[1].read_text()


FAILING = """
import sys
from vlmprune.eval.processes import Processes, ProcessError
from vlmprune.prune.errors import BudgetError

class Odd(Exception):
    def __init__(self, a, b):
        super().__init__(a + b)

with Processes.started(cpu=True) as processes:
    assert processes.world == 2
    assert processes.share(range(5)) == [range(0, 5, 2), range(1, 5, 2)][processes.rank]
    shares = processes.gather(lambda: processes.share("abcde"))
    assert processes.dealt(shares) == list("abcde")
    assert processes.from_first(lambda: processes.rank) == 0

    def fail(error):
        if processes.rank == 1:
            raise error

    for error, seen in ((BudgetError("no"), BudgetError), (Odd("a", "b"), ProcessError)):
        try:
            processes.gather(lambda: fail(error))
        except (seen, type(error)) as raised:
            assert type(raised) is (seen if processes.rank == 0 else type(error)), raised
        else:
            sys.exit("no error")
    sys.stdout.write(f"fine {processes.rank}\\n")
"""


@pytest.mark.slow
def test_an_error_in_one_process_is_raised_in_all(tmp_path):
    script = tmp_path / "failing.py"
    script.write_text(FAILING)
    done = torchrun(script, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.split()) == ["0", "1", "fine", "fine"]


def test_a_single_process_needs_nothing():
    alone = Processes.started()
    assert (alone.rank, alone.world, alone.first) == (0, 1, True)
    assert list(alone.share("abc")) == list("abc") == alone.dealt([list("abc")])
    with pytest.raises(KeyError):
        alone.gather(lambda: {}["missing"])

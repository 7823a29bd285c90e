"""`tune`: targets, successive halving within a time, the confidence, the line that patches it."""

from __future__ import annotations

import itertools

import pytest
import vlmprune
from kit.reports import fastv, record
from vlmprune.eval import cli
from vlmprune.eval.results.statistics import confidence_above, mean_score
from vlmprune.eval.tune.halving import FEWEST, better_half, halve, sizes
from vlmprune.eval.tune.outcome import final_order, patch_line, recommendation, search_table
from vlmprune.eval.tune.target import Target, TargetError
from vlmprune.eval.words.parts import parse


def cell(right: float, share: float, questions: int = 100, **changed):
    """A cell that answers the first questions right."""
    outcomes = [int(number < right * questions) for number in range(questions)]
    made = record(1, fastv(), share=share, outcomes=outcomes, **changed)
    times = {"median": share, "q1": share, "q3": share, "n": 8}
    return made | {"times": made["times"] | {"share_of_dense": times}}


QUALITY = {"": 0.9, "good": 0.9, "fair": 0.8, "poor": 0.5, "bad": 0.3, "dear": 0.9}
SHARES = {"": 1.0, "good": 0.5, "fair": 0.25, "poor": 0.1, "bad": 0.05, "dear": 0.8}


def ask(word, questions):
    if word == "refused":
        return record(1, fastv(), status="not_applicable", error={"type": "E", "message": "no"})
    return cell(QUALITY[word], SHARES[word], questions)


@pytest.mark.parametrize("text", ["tokens", "tokens=0", "latency=1.5", "speed=2", "accuracy=x"])
def test_targets_that_mean_nothing_are_refused(text, capsys):
    with pytest.raises(TargetError, match=r"latency=0\.6"):
        Target.parse(text)
    assert cli.main(["tune", "--target", text]) == 2


def test_a_target_says_what_meets_it_and_what_is_better():
    dense = ask("", 100)
    tokens, latency = Target.parse("tokens=4.5"), Target.parse("latency=0.3")
    assert [tokens.met(ask(w, 100), dense) for w in ("good", "dear")] == [1, 0]
    assert [latency.met(ask(w, 100), dense) for w in ("fair", "good")] == [1, 0]
    assert better_half({w: ask(w, 100) for w in QUALITY if w}, dense, latency) == ["fair", "poor"]
    points = Target.parse("accuracy=-15")
    assert points.met(ask("good", 100), dense) > 0.99 > points.met(ask("poor", 100), dense)
    unknown = cell(0.9, 0.2)
    unknown["times"] = unknown["times"] | {"share_of_dense": None}
    assert latency.met(unknown, dense) == 0


def test_confidence_is_of_paired_questions():
    one, other = mean_score([1, 1, 1, 0] * 20), mean_score([1, 1, 0, 0] * 20)
    assert confidence_above(one, one, 0.0) == pytest.approx(0.5)
    assert confidence_above(one, other, 0.0) > 0.99 > confidence_above(one, other, 0.24)
    assert confidence_above(other, one, 0.0) == pytest.approx(1 - confidence_above(one, other, 0.0))


def test_the_better_half_is_asked_twice_as_much():
    asked = []

    def run(word, questions):
        asked.append((word, questions))
        return ask(word, questions)

    target = Target.parse("accuracy=-12")
    words = [*filter(None, QUALITY), "refused"]
    search = halve(words, 128, run, target, seconds=1e9)
    assert [each.questions for each in search.rounds] == sizes(128) == [32, 64, 128]
    assert [len(each.found) for each in search.rounds] == [5, 3, 2] and not search.out_of_time
    assert final_order(search.last, target) == ["fair", "good"]
    best, lines = recommendation(search, target)
    assert best == "fair" and "which costs more" in lines[-1]
    rows = search_table(search, target).rows
    assert [row[:2] for row in rows][:2] == [("fair ★", "128"), ("good ★", "128")]
    assert len(rows) == 5 and ("refused", 32) in asked


def test_the_time_ends_a_search_and_what_was_decided_stays():
    def within(seconds):
        clock = itertools.count().__next__  # two readings a cell, one a round
        return halve(
            ["good", "fair", "poor"], 128, ask, Target.parse("tokens=9"),
            seconds=seconds, clock=lambda: float(clock()),
        )  # fmt: skip

    short = within(3)
    assert short.out_of_time and [*short.last.found] == ["good"]
    assert short.untried == ["fair", "poor"] and short.last.questions == FEWEST
    longer = within(14)
    assert longer.out_of_time and [*longer.last.found] == ["good", "fair", "poor"]
    assert not longer.untried


def test_the_line_patches_a_model():
    for word, line in (
        ("fastv:layer=3@0.25", 'vlmprune.patch(model, "fastv", layer=3, keep_ratio=0.25)'),
        ("divprune@avg:49", 'vlmprune.patch(model, "divprune", average_tokens=49)'),
        (
            "divprune@0.5+fastv@9",
            'vlmprune.patch(model, [vlmprune.method("divprune", keep_ratio=0.5), '
            'vlmprune.method("fastv", keep_tokens=9)])',
        ),
    ):
        assert patch_line(parse(word), None) == line
    assert vlmprune.method("divprune", keep_ratio=0.5)
    assert 'positions="original")' in patch_line(parse("grid@9"), "original")
    assert patch_line(parse("downsample@0.5"), None).startswith("No patch: ")


def test_the_command_recommends_and_goes_on(tmp_path, capsys):
    words = ["tune", "--target", "tokens=30", "--methods", "random,divprune,fastv", "--limit", "7"]
    assert cli.main([*words, "-o", str(tmp_path)]) == 0
    said = capsys.readouterr()
    assert 'vlmprune.patch(model, "divprune", average_tokens=30)' in said.out
    assert "not run: fastv" in said.err and "confidence of" in said.out
    before = (tmp_path / "runs.jsonl").read_text("utf-8").splitlines()
    assert cli.main([*words, "-o", str(tmp_path)]) == 0
    assert capsys.readouterr().out == said.out
    after = (tmp_path / "runs.jsonl").read_text("utf-8").splitlines()
    assert len(before) == 4 and after == before
    assert said.out.splitlines()[-1] in (tmp_path / "tune.md").read_text("utf-8")

"""Successive halving: all candidates on a few questions, the better half on twice as many, and so
on, until the questions or the time are used up."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from ..results.records import Record
from .target import Target

FEWEST = 32
"""Questions of the first round."""

Run = Callable[[str, int], Record]
"""(candidate, questions) -> its cell, run now or found finished. The candidate "" is dense."""


@dataclass(frozen=True)
class Round:
    """Candidates on the same questions; `found` has those that could be run, in their order."""

    questions: int
    dense: Record
    found: Mapping[str, Record]


@dataclass
class Search:
    """What was asked, and why it ended."""

    rounds: list[Round] = field(default_factory=list)
    untried: list[str] = field(default_factory=list)
    """Candidates of the first round that the time did not suffice for."""
    out_of_time: bool = False

    @property
    def last(self) -> Round:
        return self.rounds[-1]


def sizes(most: int) -> list[int]:
    """Questions of each round: twice as many as of the one before, and all in the last."""
    found = [min(FEWEST, most)]
    while found[-1] < most:
        found.append(min(2 * found[-1], most))
    return found


def halve(
    candidates: Sequence[str],
    most: int,
    run: Run,
    target: Target,
    *,
    seconds: float,
    clock: Callable[[], float] = time.monotonic,
) -> Search:
    """Search within a time: a cell is begun only while there is some left, and a round only if it
    will fit, by what questions have cost so far.

    A round that the time cuts short decides nothing, but for the first, of which those count that
    were run.

    Args:
        most: questions of the last round.
        seconds: of this call; what a search before it finished costs nothing.
    """
    search, started, spent, asked = Search(), clock(), 0.0, 0
    alive = list(candidates)
    for questions in sizes(most):
        left = seconds - (clock() - started)
        if search.rounds and asked and spent / asked * questions * (len(alive) + 1) > left:
            search.out_of_time = True
            break
        dense, found = None, dict[str, Record]()
        for word in ["", *alive]:
            begun = clock()
            if begun - started >= seconds and (search.rounds or found):
                search.out_of_time = True
                break
            record = run(word, questions)
            spent, asked = spent + clock() - begun, asked + questions
            if not word:
                dense = record
            elif record["status"] == "ok":
                found[word] = record
        cut = search.out_of_time
        if dense is None or (cut and search.rounds):
            break
        search.rounds.append(Round(questions, dense, found))
        if cut:
            search.untried = alive[alive.index(word) :]
            break
        alive = better_half(found, dense, target)
        if not alive:
            break
    return search


def ranked(found: Mapping[str, Record], dense: Record, target: Target) -> list[str]:
    """Those that may meet the target, the best first."""
    ranks = {word: target.rank(record, dense) for word, record in found.items()}
    return sorted((w for w in found if ranks[w][0] != float("inf")), key=ranks.__getitem__)


def better_half(found: Mapping[str, Record], dense: Record, target: Target) -> list[str]:
    """Two at least, so that the best has one to be compared with."""
    order = ranked(found, dense, target)
    return order[: max(2, (len(order) + 1) // 2)]

"""Baselines at equal tokens: which of their cells stands beside another one, and how a cell does on
the questions that smaller pictures fail."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..words.typed import DOWNSAMPLE
from .records import Record, method_name
from .statistics import Score, difference, mean_score

BASELINES = ("random", "grid", DOWNSAMPLE)
MOST_APART = 1.25
"""Tokens are called equal up to this ratio: 22 beside 25, which are the nearest square."""


def at_equal_tokens(record: Record, cells: Iterable[Record], name: str) -> Record | None:
    """The finished cell of a baseline whose tokens a layer are nearest, of the same positions where
    there are such; None where none has about as many, and for the baseline itself.

    Of a method on the KV cache its entries in the cache count as tokens.
    """
    wanted = _tokens(record)
    if wanted is None or method_name(record) in (name, "dense"):
        return None
    near = [
        (cell["config"]["positions"] != record["config"]["positions"], apart, number, cell)
        for number, cell in enumerate(cells)
        if cell["status"] == "ok" and method_name(cell) == name
        if (apart := _apart(_tokens(cell), wanted)) <= MOST_APART
    ]
    return min(near, key=lambda each: each[:3])[-1] if near else None


@dataclass(frozen=True)
class Hard:
    """A cell on the questions that `downsample` answers wrong at equal tokens.

    `rest` is of all others, `dense` the dense model on the hard ones; None where there are none.
    """

    beside: Record
    score: Score
    rest: Score | None
    dense: Score | None

    @property
    def above_dense(self) -> tuple[float, float | None, float | None] | None:
        """Paired difference to dense on the hard questions, with its interval."""
        return difference(self.score, self.dense) if self.dense else None


def hard(record: Record, cells: Sequence[Record], dense: Record | None, metric: str) -> Hard | None:
    """None where no cell of `downsample` has as many tokens or the metric question by question,
    and where it fails none."""
    beside = at_equal_tokens(record, cells, DOWNSAMPLE)
    if beside is None or not (outcomes := _outcomes(beside, metric)):
        return None
    failed = [number for number, outcome in enumerate(outcomes) if outcome == 0]
    passed = [number for number, outcome in enumerate(outcomes) if outcome != 0]
    if not failed or len(_outcomes(record, metric)) != len(outcomes):
        return None
    paired = dense is not None and len(_outcomes(dense, metric)) == len(outcomes)
    return Hard(
        beside,
        _part(record["scores"][metric], failed),
        _part(record["scores"][metric], passed) if passed else None,
        _part(dense["scores"][metric], failed) if dense is not None and paired else None,
    )


def _part(score: Score, numbers: Sequence[int]) -> Score:
    """A score on some of its questions."""
    outcomes = [score["outcomes"][number] for number in numbers]
    return mean_score(outcomes, unit=score["unit"], higher_is_better=score["higher_is_better"])


def _outcomes(record: Record, metric: str) -> list[float]:
    """Question by question; none where lower is better, or the metric is no mean over questions."""
    score = record["scores"].get(metric)
    return score["outcomes"] if score and score["higher_is_better"] else []


def _tokens(record: Record) -> float | None:
    tokens = record.get("tokens")
    if not tokens:
        return None
    return float(tokens.get("cache_per_image", tokens["average_per_layer"]))


def _apart(one: float | None, other: float) -> float:
    if not one or not other:
        return float("inf")
    return max(one, other) / min(one, other)

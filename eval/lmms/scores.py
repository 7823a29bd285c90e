"""What lmms-eval found for a task -> scores with intervals."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..results.statistics import Score, Unit, aggregate_score, mean_score, resampled
from .stock import takes_one_argument

_SLOW = 0.1  # seconds; an aggregation that takes longer is not repeated for an interval


class Scores:
    """Reads the metrics of one task, cell after cell, in the same units."""

    def __init__(self, task: Any) -> None:
        self.task = task
        self._points: set[str] = set()

    def read(
        self, results: Mapping[str, Any], items: Mapping[str, Sequence[Any]]
    ) -> dict[str, Score]:
        """The task's metrics, in its own order.

        Args:
            results: of the task, `metric,filter` -> value.
            items: what the questions that count gave, by metric and filter, in their order.
        """
        order = list(self.task.aggregation())
        found: dict[str, Score] = {}
        filters = {key.partition(",")[2] for key in items}
        for key in sorted(items, key=lambda key: order.index(key.partition(",")[0])):
            metric = key.partition(",")[0]
            value = _number(results.get(key))
            if value is None:  # written to a file for a judge elsewhere, or a table
                continue
            better = self.task.higher_is_better().get(metric)
            name = metric if len(filters) == 1 else key
            found[name] = self._score(metric, value, items[key], better is not False)
        return found

    def _score(
        self, metric: str, value: float, items: Sequence[Any], higher_is_better: bool
    ) -> Score:
        aggregate = self.task.aggregation()[metric]
        numbers = [_number(item) for item in items]
        outcomes = [number for number in numbers if number is not None]
        if _is_mean(aggregate) and len(outcomes) == len(items):
            unit = self._unit(metric, [value, *outcomes])
            return mean_score(outcomes, unit=unit, higher_is_better=higher_is_better)
        replicates = _replicates(aggregate, items)
        return aggregate_score(
            value,
            len(items),
            unit=self._unit(metric, [value, *replicates]),
            higher_is_better=higher_is_better,
            replicates=replicates,
        )

    def _unit(self, metric: str, values: Sequence[float]) -> Unit:
        if not all(0 <= value <= 1 for value in values):
            self._points.add(metric)
        return "points" if metric in self._points else "share"


def single_score(metrics: Sequence[str], logged: Mapping[str, Any]) -> float | None:
    """What one question gave for the first metric that it counts for: a number, or a mapping with
    a `score`."""
    for metric in metrics:
        if metric in logged:
            given = logged[metric]
            return _number(given.get("score") if isinstance(given, Mapping) else given)
    return None


def _replicates(aggregate: Callable[..., Any], items: Sequence[Any]) -> list[float]:
    """The metric on resamples; none where it writes files, takes long, or fails on some."""
    if not takes_one_argument(aggregate):
        return []
    started = time.perf_counter()
    if _number(aggregate(list(items))) is None or time.perf_counter() - started > _SLOW:
        return []
    try:
        found = resampled(_together(items), lambda drawn: float(aggregate(_apart(drawn))))
    except (ArithmeticError, AssertionError, ValueError, LookupError, TypeError):
        return []  # on some resamples it is not defined, e.g. as a kind of question is missing
    return found if all(map(math.isfinite, found)) else []


def _together(items: Sequence[Any]) -> list[list[Any]]:
    """Items that are drawn as one: those with the same `question_id`, as MME's pairs."""
    groups: dict[object, list[Any]] = {}
    for number, item in enumerate(items):
        key = item.get("question_id", number) if isinstance(item, Mapping) else number
        category = item.get("category") if isinstance(item, Mapping) else None
        groups.setdefault((str(category), str(key)), []).append(item)
    return list(groups.values())


def _apart(drawn: Sequence[Sequence[Any]]) -> list[Any]:
    """The items of what was drawn; a group that was drawn twice is two groups."""
    return [
        {**item, "question_id": f"{item['question_id']} {number}"}
        if isinstance(item, Mapping) and "question_id" in item
        else item
        for number, group in enumerate(drawn)
        for item in group
    ]


def _is_mean(aggregate: Any) -> bool:
    from lmms_eval.api.registry import AGGREGATION_REGISTRY

    return aggregate is AGGREGATION_REGISTRY["mean"]


def _number(value: Any) -> float | None:
    """A finite number, or None."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if not isinstance(value, str) and math.isfinite(number) else None

"""What lmms-eval found for a task -> scores with intervals."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..stats import Score, Unit, aggregate_score, mean_score, resampled
from .stock import takes_one_argument

_SLOW = 0.1  # seconds; an aggregation that takes longer is not repeated for an interval


class Scores:
    """Reads the metrics of one task, cell after cell, in the same units."""

    def __init__(self, task: Any) -> None:
        self.task = task
        self._points: set[str] = set()

    def read(
        self, results: Mapping[str, Any], items: Mapping[str, Sequence[Any]], n: int
    ) -> dict[str, Score]:
        """The task's metrics, in its own order.

        Args:
            results: of the task, `metric,filter` -> value.
            items: what the questions gave, by metric and filter, in their order.
            n: questions.
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
            found[name] = self._score(metric, value, items[key], n, better is not False)
        return found

    def _score(
        self, metric: str, value: float, items: Sequence[Any], n: int, higher_is_better: bool
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
            n,
            unit=self._unit(metric, [value, *replicates]),
            higher_is_better=higher_is_better,
            replicates=replicates,
        )

    def _unit(self, metric: str, values: Sequence[float]) -> Unit:
        if not all(0 <= value <= 1 for value in values):
            self._points.add(metric)
        return "points" if metric in self._points else "share"


def _replicates(aggregate: Callable[..., Any], items: Sequence[Any]) -> list[float]:
    """The metric on resamples; none where it writes files, takes long, or fails on some."""
    if not takes_one_argument(aggregate):
        return []
    started = time.perf_counter()
    if _number(aggregate(list(items))) is None or time.perf_counter() - started > _SLOW:
        return []
    try:
        found = resampled(items, lambda drawn: float(aggregate(drawn)))
    except (ArithmeticError, ValueError, LookupError, TypeError):  # a kind of question is missing
        return []
    return found if all(map(math.isfinite, found)) else []


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

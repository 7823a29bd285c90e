"""The points of the accuracy-cost frontier, as plain data for the page's script."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..results.statistics import Score
from ..results.task_kinds import Cost
from ..results.texts import metric_label, scale
from .cells import Cell, Section, cost_of, finite, pareto
from .grids import score_of


def chart(section: Section, anchors: dict[str, str]) -> dict[str, Any] | None:
    """What is drawn for one setting; None if no cell finished.

    Args:
        anchors: where on the page the configuration of a cell is, by the cell's id.
    """
    done = section.done
    if not done:
        return None
    metrics, costs = section.metrics, section.kind.costs
    return {
        "costs": [{"key": cost.key, "label": cost.label} for cost in costs],
        "metrics": [
            {"label": metric_label(name, score), "range": _range(score)}
            for name, score in metrics.items()
        ],
        "points": [_point(cell, costs, list(metrics), anchors) for cell in done],
        "frontier": {
            cost.key: [
                pareto(
                    [(cost_of(cell.record, cost), score_of(cell, name)) for cell in done],
                    higher_is_better=score["higher_is_better"],
                )
                for name, score in metrics.items()
            ]
            for cost in costs
        },
    }


def _point(
    cell: Cell, costs: Sequence[Cost], metrics: list[str], anchors: dict[str, str]
) -> dict[str, Any]:
    record = cell.record
    return {
        "id": record["id"],
        "anchor": anchors[record["id"]],
        "variant": cell.variant,
        "budget": cell.budget,
        "dense": cell.dense,
        "costs": {cost.key: _rounded(cost_of(record, cost), cost.digits + 2) for cost in costs},
        "scores": [_score(record["scores"].get(name)) for name in metrics],
    }


def _score(score: Score | None) -> dict[str, float | None] | None:
    """Value and interval as they are shown: shares in percent."""
    if score is None or finite(score["value"]) is None:
        return None
    by = scale(score)
    low, high = finite(score["low"]), finite(score["high"])
    return {
        "value": _rounded(by * score["value"], 4),
        "low": None if low is None else _rounded(by * low, 4),
        "high": None if high is None else _rounded(by * high, 4),
        "n": score["n"],
    }


def _range(score: Score) -> list[float] | None:
    """What a metric's axis never leaves."""
    return [0, 100] if score["unit"] == "share" else None


def _rounded(value: float | None, digits: int) -> float | None:
    return None if value is None else round(value, digits)

"""Averages over the tasks of a model."""

from __future__ import annotations

from collections.abc import Sequence

from ..results.averages import percent_of_dense
from .cells import Cell, Section
from .grids import Entry, Grid, Row


def averages_table(sections: Sequence[Section]) -> list[tuple[str, Grid]]:
    """For every model that was asked several tasks: percent of dense, by task and averaged."""
    by_model: dict[str, list[Cell]] = {}
    for section in sections:
        by_model.setdefault(str(section.config["model"]), []).extend(section.done)
    tables = []
    for model, cells in by_model.items():
        found = [f for f in percent_of_dense([c.record for c in cells]) if len(f.tasks) > 1]
        tasks = list(dict.fromkeys(task for one in found for task in one.tasks))
        if not tasks:
            continue
        rows = [
            Row(
                [
                    Entry(one.variant, one.variant),
                    Entry(one.budget, one.budget),
                    _percent(one.average),
                    *(_percent(one.by_task.get(task)) for task in tasks),
                    Entry(str(len(one.tasks)), len(one.tasks)),
                ]
            )
            for one in found
        ]
        headers = ["Method", "Budget", "Average % of dense", *tasks, "Tasks"]
        tables.append((model, Grid(headers, rows)))
    return tables


def _percent(value: float | None) -> Entry:
    return Entry("" if value is None else f"{value:.1f}", value)

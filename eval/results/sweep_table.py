"""Records of a sweep as tables: a line a cell, accuracies by budget, percent of dense by task."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ...prune.budget import PUBLISHED
from ..environment import describe
from ..table import Table
from .averages import percent_of_dense
from .records import (
    Record,
    budget_text,
    earlier_text,
    latest,
    main_score,
    method_name,
    variant,
)
from .statistics import difference
from .task_kinds import ANSWERS, TaskKind, kind_of
from .texts import in_unit, metric_text, scale, setting_line, with_interval

_MIXED = "several"  # the column of methods that are combined under different budgets


def sweep_table(records: Sequence[Record]) -> Table:
    """Every record of one setting: dense first, then by method, costliest budget first."""
    ordered = in_order(records)
    dense = next((r for r in ordered if method_name(r) == "dense" and r["status"] == "ok"), None)
    kind = kind_of(ordered[0]["config"]) if ordered else ANSWERS
    measured = (column.header for column in kind.short)
    return Table(
        headers=("Method", "Budget", _metric(ordered), "vs dense", *measured),
        rows=[_row(record, dense, kind) for record in ordered],
        title=_title(ordered[0]) if ordered else None,
        notes=_notes(ordered, kind),
        droppable=kind.droppable,
    )


def _notes(records: Sequence[Record], kind: TaskKind) -> str:
    notes = kind.short_notes.format(_metric(records).removesuffix(" %"))
    hidden = earlier_text(records)
    return f"{notes} {hidden[0].upper()}{hidden[1:]}." if hidden else notes


def accuracy_table(records: Sequence[Record]) -> Table:
    """One row per method, one column per budget: accuracy, and the average of tokens entering a
    layer where the method decided on their number itself. Methods combined under different budgets
    are rows of their own."""
    ordered = [r for r in in_order(records) if method_name(r) != "dense"]
    places = {id(r): _place(r) for r in ordered}
    last = (PUBLISHED, _MIXED)
    budgets = list(dict.fromkeys(column for _, column in places.values()))
    budgets.sort(key=lambda column: last.index(column) + 1 if column in last else 0)
    cells = {places[id(r)]: _accuracy(r) for r in ordered}
    return Table(
        headers=("Method", *budgets),
        rows=[
            (name, *(cells.get((name, budget), "") for budget in budgets))
            for name in dict.fromkeys(name for name, _ in places.values())
        ],
        title=_title(ordered[0]) if ordered else None,
    )


def averages_table(records: Sequence[Record]) -> Table:
    """Percent of dense on every task, and their mean, of all methods and budgets."""
    shares = percent_of_dense(records)
    tasks = list(dict.fromkeys(task for share in shares for task in share.tasks))

    def percent(value: float | None) -> str:
        return "" if value is None else f"{value:.1f}"

    return Table(
        headers=("Method", "Budget", *tasks, "Average"),
        rows=[
            (
                share.variant,
                share.budget,
                *(percent(share.by_task.get(task)) for task in tasks),
                percent(share.average),
            )
            for share in shares
        ],
        notes="In percent of the dense model, by the metric that papers report (else the task's "
        "main one); the average is over all tasks of the line, and missing where the dense model "
        "is.",
    )


def _place(record: Record) -> tuple[str, str]:
    """Row and column of a record among accuracies."""
    budgets = budget_text(record).split("+")
    if len(set(budgets)) == 1:
        return variant(record), budgets[0]
    return f"{variant(record)} at {' + '.join(budgets)}", _MIXED


def _accuracy(record: Record) -> str:
    if record["status"] != "ok":
        return "not applicable" if record["status"] == "not_applicable" else "FAILED"
    own = f" ({record['tokens']['average_per_layer']:.4g} a layer)"
    return in_unit(main_score(record)[1]) + own * (PUBLISHED in budget_text(record))


def in_order(records: Sequence[Record]) -> list[Record]:
    """Dense first, then methods as they first appeared, each by falling cost; see `latest`."""
    records = latest(records)
    methods = list(dict.fromkeys(variant(record) for record in records))

    def key(record: Record) -> tuple[bool, int, float]:
        done = record["status"] == "ok"
        share = kind_of(record["config"]).share(record) if done else math.inf
        return method_name(record) != "dense", methods.index(variant(record)), -share

    return sorted(records, key=key)


def _row(record: Record, dense: Record | None, kind: TaskKind) -> tuple[str, ...]:
    head = (variant(record), budget_text(record))
    if record["status"] != "ok":
        what = "not applicable" if record["status"] == "not_applicable" else "FAILED"
        return (*head, what, *[""] * (1 + len(kind.short)))
    return (
        *head,
        with_interval(main_score(record)[1]),
        _difference(record, dense),
        *(column.text(record) for column in kind.short),
    )


def _difference(record: Record, dense: Record | None) -> str:
    if dense is None or record is dense:
        return ""
    score = main_score(record)[1]
    found = difference(score, main_score(dense)[1])
    value, *interval = (None if x is None else x * scale(score) for x in found)
    low, high = interval
    return f"{value:+.1f}" + ("" if low is None or high is None else f" [{low:+.1f}, {high:+.1f}]")


def _metric(records: Sequence[Record]) -> str:
    return next((metric_text(r) for r in records if r["status"] == "ok"), "Score")


def _title(record: Record) -> str:
    return (
        f"{setting_line(record['config'])}, batch_size: {record['batch_size']}, "
        f"on {describe(record['hardware'])}"
    )

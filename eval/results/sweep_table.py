"""Records of a sweep as tables: a line a cell, accuracies by budget, percent of dense by task."""

from __future__ import annotations

from collections.abc import Sequence

from ...prune.budget import PUBLISHED
from ..environment import describe
from ..table import Table
from .averages import percent_of_dense
from .records import (
    Record,
    Times,
    Tokens,
    budget_text,
    cache_text,
    earlier_text,
    latest,
    main_score,
    method_name,
    variant,
)
from .statistics import difference
from .texts import in_unit, metric_text, milliseconds, scale, setting_line, with_interval

NOTES = (
    "{} with its 95 % interval; difference to dense paired question by question. Tokens: "
    "visual tokens kept of those an image has, and the mean entering a decoder layer (in brackets: "
    "left behind it, as SparseVLM counts, where that differs). Prefill: decoder FLOPs with text "
    "(multiply-add = 2). Share: of the dense decoder FLOPs, visual tokens only. Times: medians at "
    "batch 1; (%) of dense on the same questions in turn."
)

_MIXED = "several"  # the column of methods that are combined under different budgets


def sweep_table(records: Sequence[Record]) -> Table:
    """Every record of one setting: dense first, then by method, costliest budget first."""
    ordered = in_order(records)
    dense = next((r for r in ordered if method_name(r) == "dense" and r["status"] == "ok"), None)
    headers = (
        "Method",
        "Budget",
        _metric(ordered),
        "vs dense",
        "Tokens",
        "Avg/layer",
        "Prefill GFLOPs",
        "Share %",
        "First token ms",
        "ms/token",
        "KV KiB",
    )
    return Table(
        headers=headers,
        rows=[_row(record, dense, len(headers)) for record in ordered],
        title=_title(ordered[0]) if ordered else None,
        notes=_notes(ordered),
        droppable=(9, 6, 5, 3, 8),
    )


def _notes(records: Sequence[Record]) -> str:
    notes = NOTES.format(_metric(records).removesuffix(" %"))
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
        share = record["flops"]["visual_share"] if record["status"] == "ok" else 2.0
        return method_name(record) != "dense", methods.index(variant(record)), -share

    return sorted(records, key=key)


def _row(record: Record, dense: Record | None, width: int) -> tuple[str, ...]:
    head = (variant(record), budget_text(record))
    if record["status"] != "ok":
        what = "not applicable" if record["status"] == "not_applicable" else "FAILED"
        return (*head, what, *[""] * (width - 3))
    tokens, times = record["tokens"], record["times"]
    return (
        *head,
        with_interval(main_score(record)[1]),
        _difference(record, dense),
        f"{tokens['kept_per_image']:.4g}/{tokens['in_per_image']:.4g}{cache_text(tokens)}",
        _averages(tokens),
        f"{record['flops']['prefill'] / 1e9:.3g}",
        f"{100 * record['flops']['visual_share']:.1f}",
        _first_token(times),
        milliseconds(times["per_decoded_token"]),
        f"{record['kv_bytes'] / 1024:.0f}",
    )


def _averages(tokens: Tokens) -> str:
    """Both conventions of average tokens, the second one where it says something else."""
    entering = f"{tokens['average_per_layer']:.1f}"
    behind = f"{tokens.get('average_after_cuts', tokens['average_per_layer']):.1f}"
    return entering if behind == entering else f"{entering} ({behind})"


def _first_token(times: Times) -> str:
    share = times["share_of_dense"]
    beside = f" ({100 * share['median']:.0f} %)" if share else ""
    return milliseconds(times["first_token"]) + beside


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

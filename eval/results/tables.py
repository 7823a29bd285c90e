"""Result records as a table: coloured in a terminal, Markdown where it is pasted or piped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table as RichTable
from rich.text import Text

from ...prune.budget import PUBLISHED
from ..environment import describe
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
from .statistics import Score, Spread, difference

NOTES = (
    "{} with its 95 % interval; difference to dense paired question by question. Tokens: "
    "visual tokens kept of those an image has, and the mean entering a decoder layer (in brackets: "
    "left behind it, as SparseVLM counts, where that differs). Prefill: decoder FLOPs with text "
    "(multiply-add = 2). Share: of the dense decoder FLOPs, visual tokens only. Times: medians at "
    "batch 1; (%) of dense on the same questions in turn."
)

_MIXED = "several"  # the column of methods that are combined under different budgets
_WRAPPED_WIDTH = 14  # the least that a column of running text gets


@dataclass(frozen=True)
class Table:
    """Headers and rows of text, numbers to the right from column `numbers_from` on.

    In a terminal, only the columns in `wrapping` are broken into lines, and where there is no room
    the columns in `droppable` are left out, first to last; Markdown always has all.
    """

    headers: tuple[str, ...]
    rows: list[tuple[str, ...]]
    numbers_from: int = 2
    title: str | None = None
    notes: str | None = None
    wrapping: tuple[int, ...] = ()
    droppable: tuple[int, ...] = ()

    def markdown(self) -> str:
        """GitHub Markdown."""
        marks = ["---" if i < self.numbers_from else "---:" for i in range(len(self.headers))]
        lines = [list(self.headers), marks, *(list(row) for row in self.rows)]
        body = "\n".join("| " + " | ".join(_cell(c) for c in line) + " |" for line in lines)
        parts = [self.title, body, self.notes]
        return "\n\n".join(part for part in parts if part)

    def print(self, console: Console) -> None:
        if not console.is_terminal:
            console.print(self.markdown(), markup=False)
            return
        if self.title:
            console.print(self.title, markup=False, style="bold", soft_wrap=False)
        dropped = 0
        table = self._rich(dropped)
        while self._too_wide(table, console) and dropped < len(self.droppable):
            dropped += 1
            table = self._rich(dropped)
        console.print(table, soft_wrap=False)
        if dropped:
            names = ", ".join(self.headers[i] for i in self.droppable[:dropped])
            console.print(f"No room for: {names}.", markup=False, style="dim", soft_wrap=False)
        if self.notes:
            console.print(self.notes, markup=False, style="dim", soft_wrap=False)

    def _rich(self, dropped: int) -> RichTable:
        shown = [i for i in range(len(self.headers)) if i not in self.droppable[:dropped]]
        table = RichTable(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
        for index in shown:
            wraps = index in self.wrapping
            header = self.headers[index] if wraps else self.headers[index].replace(" ", "\n")
            texts = [*header.split("\n"), *(row[index] for row in self.rows)]
            table.add_column(
                header,
                justify="left" if index < self.numbers_from else "right",
                no_wrap=not wraps,
                overflow="fold",
                min_width=_WRAPPED_WIDTH if wraps else max(map(cell_len, texts)),
            )
        for row in self.rows:
            table.add_row(*(Text(row[index]) for index in shown))
        return table

    @staticmethod
    def _too_wide(table: RichTable, console: Console) -> bool:
        unlimited = console.options.update(width=10_000)
        return Measurement.get(console, unlimited, table).minimum > console.width


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


def scale(score: Score) -> int:
    """What a value is multiplied with to be shown: shares are in percent."""
    return 100 if score["unit"] == "share" else 1


def in_unit(score: Score) -> str:
    """The value, in percent or points."""
    return f"{scale(score) * score['value']:.1f}"


def with_interval(score: Score) -> str:
    """The value and its 95 % interval, in percent or points."""
    if score["low"] is None or score["high"] is None:
        return in_unit(score)
    by = scale(score)
    return f"{in_unit(score)} [{by * score['low']:.1f}, {by * score['high']:.1f}]"


def metric_text(record: Mapping[str, Any]) -> str:
    """The name of the main metric as a heading."""
    return metric_label(*main_score(record))


def metric_label(name: str, score: Score) -> str:
    """A metric as a heading, with its unit, and which way is better where that is not up."""
    words = f"{name[:1].upper()}{name[1:]}".replace("_", " ")
    down = "" if score["higher_is_better"] else " (lower is better)"
    return words + (" %" if score["unit"] == "share" else "") + down


def _metric(records: Sequence[Record]) -> str:
    return next((metric_text(r) for r in records if r["status"] == "ok"), "Score")


def milliseconds(spread: Spread | None) -> str:
    return f"{1e3 * spread['median']:.1f}" if spread else ""


def setting_line(config: Mapping[str, Any]) -> str:
    """What was run, in one line."""
    limit = config["limit"] if config["limit"] is not None else "all"
    kinds = f"kinds: {' '.join(config['kinds'])}, " if config.get("kinds") else ""
    return (
        f"model: {config['model']} ({config['dtype']}, {config['attn_implementation']}), "
        f"task: {config['task']} v{config['task_version']}, {kinds}limit: {limit}, "
        f"seed: {config['seed']}"
    )


def _title(record: Record) -> str:
    return (
        f"{setting_line(record['config'])}, batch_size: {record['batch_size']}, "
        f"on {describe(record['hardware'])}"
    )


def _cell(text: str) -> str:
    return text.replace("|", "\\|")

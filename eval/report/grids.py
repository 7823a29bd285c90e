"""The tables of a report, for every format: headers, and rows of texts with what they sort by."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..results.texts import in_unit, metric_label, scale, with_interval
from .cells import Cell, Section, cost_of, finite, pareto

MISSING = {"failed": "failed", "not_applicable": "not applicable"}


@dataclass(frozen=True)
class Entry:
    """A table's cell. `order`: what a column is sorted by; None goes last."""

    text: str
    order: float | str | None = None


@dataclass(frozen=True)
class Row:
    """`cell` is what the row is about, `best` whether it is on the frontier of score and cost."""

    entries: list[Entry]
    cell: Cell | None = None
    best: bool = False


@dataclass(frozen=True)
class Grid:
    """A table; numbers from column `numbers_from` on, up to `numbers_to`."""

    headers: list[str]
    rows: list[Row]
    numbers_from: int = 2
    numbers_to: int | None = None

    def is_number(self, column: int) -> bool:
        return column in range(len(self.headers))[self.numbers_from : self.numbers_to]


def main_table(section: Section) -> Grid:
    """Every cell: its score beside dense, and what its kind of task measures."""
    name = section.main
    label = metric_label(name, section.metrics[name]) if name else "Score"
    measured = (column.header for column in section.kind.columns)
    best = on_frontier(section)
    return Grid(
        ["Method", "Budget", label, "vs dense", *measured],
        [
            Row(_main_row(section, cell, name), cell, cell.record["id"] in best)
            for cell in section.cells
        ],
    )


def on_frontier(section: Section) -> set[str]:
    """Ids of the cells that no other beats in the main score and the share of what dense pays."""
    name, done = section.main, section.done
    if name is None:
        return set()
    points = [(cost_of(c.record, section.kind.costs[0]), score_of(c, name)) for c in done]
    up = section.metrics[name]["higher_is_better"]
    return {done[i].record["id"] for i in pareto(points, higher_is_better=up)}


def score_of(cell: Cell, metric: str) -> float | None:
    """A metric of a finished cell, if it has it."""
    score = cell.record["scores"].get(metric)
    return finite(score["value"]) if score else None


def _main_row(section: Section, cell: Cell, metric: str | None) -> list[Entry]:
    head = [Entry(cell.variant, cell.variant), Entry(cell.budget, cell.budget)]
    columns, record = section.kind.columns, cell.record
    if not cell.ok or metric is None:
        return [*head, Entry(MISSING.get(record["status"], "")), *[Entry("")] * (1 + len(columns))]
    return [
        *head,
        score_entry(cell, metric),
        difference_entry(section, cell, metric),
        *(Entry(column.text(record), finite(column.value(record))) for column in columns),
    ]


def score_entry(cell: Cell, metric: str) -> Entry:
    """A metric with its interval, empty where the cell lacks it."""
    score = cell.record["scores"].get(metric)
    return Entry(with_interval(score), finite(score["value"])) if score else Entry("")


def difference_entry(section: Section, cell: Cell, metric: str) -> Entry:
    """What a cell is above dense, paired, with its interval."""
    found = section.against_dense(cell, metric)
    return signed_entry(found, scale(cell.record["scores"][metric])) if found else Entry("")


def signed_entry(found: tuple[float, float | None, float | None] | None, by: int) -> Entry:
    """A difference with its interval, times `by`; empty where there is none."""
    if found is None:
        return Entry("")
    value, low, high = found
    interval = "" if low is None or high is None else f" [{by * low:+.1f}, {by * high:+.1f}]"
    return Entry(f"{by * value:+.1f}{interval}", finite(value))


def metrics_table(section: Section) -> Grid | None:
    """All metrics, each beside dense; None if the task has one only."""
    metrics = section.metrics
    if len(metrics) < 2:
        return None
    headers = ["Method", "Budget"]
    for name, score in metrics.items():
        headers += [metric_label(name, score), "vs dense"]
    rows = []
    for cell in section.done:
        entries = [Entry(cell.variant, cell.variant), Entry(cell.budget, cell.budget)]
        for name in metrics:
            entries += [score_entry(cell, name), difference_entry(section, cell, name)]
        rows.append(Row(entries, cell))
    return Grid(headers, rows)


def kinds_table(section: Section) -> Grid | None:
    """The main metric by kind of question; None if there are no kinds, or a single one."""
    name = section.main
    if name is None:
        return None
    scores = [(cell, cell.record["scores"].get(name)) for cell in section.done]
    kinds = _union(score["by_kind"] for _, score in scores if score)
    if len(kinds) < 2:
        return None
    counts = section.metrics[name]["by_kind"]
    headers = ["Method", "Budget"]
    headers += [f"{kind} ({counts[kind]['n']:g})" if kind in counts else kind for kind in kinds]
    rows = []
    for cell, score in scores:
        if score is None:
            continue
        entries = [Entry(cell.variant, cell.variant), Entry(cell.budget, cell.budget)]
        for kind in kinds:
            part = score["by_kind"].get(kind)
            text = f"{scale(score) * part['value']:.1f}" if part else ""
            entries.append(Entry(text, finite(part["value"]) if part else None))
        rows.append(Row(entries, cell))
    return Grid(headers, rows)


def dense_text(section: Section) -> str | None:
    """The dense score in words for a summary; None if there is none."""
    if section.dense is None or section.main is None:
        return None
    score = section.dense.record["scores"].get(section.main)
    if score is None:
        return None
    return f"{in_unit(score)}{' %' if score['unit'] == 'share' else ''}"


def _union(groups: Iterable[Iterable[str]]) -> list[str]:
    return list(dict.fromkeys(word for group in groups for word in group))


def facts(section: Section) -> list[tuple[str, str]]:
    """What all cells of a section share, as pairs of a word and its value."""
    config = section.config
    pairs: list[tuple[str, object]] = [
        ("Model", config["model"]),
        ("Weights", f"{config['fingerprint']}, {config['dtype']}, {config['attn_implementation']}"),
    ]
    if config.get("model_args"):
        listed = ", ".join(f"{key}={value}" for key, value in config["model_args"].items())
        pairs.append(("Model arguments", listed))
    pairs.append(("Task", f"{config['task']}, version {config['task_version']}"))
    if config.get("kinds"):
        pairs.append(("Kinds of questions", ", ".join(config["kinds"])))
    limit = config["limit"] if config["limit"] is not None else "all"
    pairs += [
        (f"{section.kind.item.capitalize()}s", f"limit {limit}, seed {config['seed']}"),
    ]
    if config.get("max_new_tokens"):
        pairs.append(("New tokens", f"at most {config['max_new_tokens']}"))
    if config.get("batch_size"):
        pairs.append(("Batch size", config["batch_size"]))
    pairs += [
        ("Hardware", several(section.hardware)),
        ("Versions", several(section.versions)),
    ]
    if section.earlier:
        pairs.append(("Left out", section.earlier))
    return [(word, str(value)) for word, value in pairs]


def several(values: Sequence[str]) -> str:
    return "; or ".join(values)

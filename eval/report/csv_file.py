"""A report as CSV: one row a cell and metric, numbers in full."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence
from typing import Any

from ..results import flat
from ..results.baselines import hard
from ..results.task_kinds import kind_of
from . import escape
from .cells import Cell, Section
from .repeat import command_of


def render(sections: Sequence[Section], *, with_hard: bool = False) -> str:
    """All cells; those without numbers have a row with their error.

    Args:
        with_hard: also columns of the questions that `downsample` fails.
    """
    rows = [
        row
        for section in sections
        for cell in section.cells
        for row in _rows(section, cell, with_hard)
    ]
    fullest_first = sorted(rows, key=len, reverse=True)
    headers = list(dict.fromkeys(key for row in fullest_first for key in row))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\r\n")
    writer.writerow(headers)
    for row in rows:
        writer.writerow([escape.csv(row.get(header, "")) for header in headers])
    return text.getvalue()


def _rows(section: Section, cell: Cell, with_hard: bool) -> Iterator[dict[str, Any]]:
    record = cell.record
    head = flat.head(record)
    tail = flat.tail(record) | {
        "error": "" if cell.ok else cell.reason,
        "hardware": json.dumps(record["hardware"], sort_keys=True),
        "versions": json.dumps(record["versions"], sort_keys=True),
        "methods": json.dumps(record["config"]["methods"], sort_keys=True),
        "command": command_of(record),
    }
    if not cell.ok:
        yield head | tail
        return
    numbers = kind_of(record["config"]).numbers(record)
    numbers["tokens_per_layer"] = " ".join(f"{n:g}" for n in numbers["tokens_per_layer"])
    dense = section.dense.record if section.dense else None
    for metric in record["scores"]:
        on_hard = _hard(section, cell, metric) if with_hard else {}
        yield head | flat.score(record, metric, dense) | on_hard | numbers | tail


def _hard(section: Section, cell: Cell, metric: str) -> dict[str, Any]:
    """A metric on the questions that `downsample` fails, the same columns for every cell."""
    dense = section.dense.record if section.dense else None
    found = hard(cell.record, [other.record for other in section.done], dense, metric)
    score = found.score if found else None
    above = found.above_dense if found else None
    return {
        "hard_questions": score["n"] if score else None,
        "hard_value": score["value"] if score else None,
        "hard_low": score["low"] if score else None,
        "hard_high": score["high"] if score else None,
        **dict(
            zip(
                ("hard_vs_dense", "hard_vs_dense_low", "hard_vs_dense_high"),
                above or (None, None, None),
                strict=True,
            )
        ),
        "rest_value": found.rest["value"] if found and found.rest else None,
    }

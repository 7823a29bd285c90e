"""A report as CSV: one row a cell and metric, numbers in full."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence
from typing import Any

from ..results import flat
from ..results.task_kinds import kind_of
from . import escape
from .cells import Cell, Section
from .repeat import command_of


def render(sections: Sequence[Section]) -> str:
    """All cells; those without numbers have a row with their error."""
    rows = [row for section in sections for cell in section.cells for row in _rows(section, cell)]
    fullest_first = sorted(rows, key=len, reverse=True)
    headers = list(dict.fromkeys(key for row in fullest_first for key in row))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\r\n")
    writer.writerow(headers)
    for row in rows:
        writer.writerow([escape.csv(row.get(header, "")) for header in headers])
    return text.getvalue()


def _rows(section: Section, cell: Cell) -> Iterator[dict[str, Any]]:
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
        yield head | flat.score(record, metric, dense) | numbers | tail

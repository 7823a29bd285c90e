"""Rotary positions side by side in a report: kept tokens where they were, and closed up."""

from __future__ import annotations

from ..results.records import Record
from ..results.statistics import difference
from ..results.texts import scale
from .cells import Cell, Section
from .grids import Entry, Grid, Row, score_entry, signed_entry

ORIGINAL, REPACKED = "original", "repacked"
NOTE = (
    "Original: what is kept stays at its positions, gaps between. Repacked: positions are closed "
    "up. The same cells but for this; paired, with 95 % intervals."
)


def positions_table(section: Section) -> Grid | None:
    """None where no cell was run with both."""
    metric = section.main
    if metric is None:
        return None
    repacked = {_but_positions(c.record): c for c in section.done if _mode(c.record) == REPACKED}
    rows = [
        _row(cell, other, metric)
        for cell in section.done
        if _mode(cell.record) == ORIGINAL
        if (other := repacked.get(_but_positions(cell.record))) is not None
    ]
    headers = ["Method", "Budget", "Original", "Repacked", "Original - repacked"]
    return Grid(headers, rows) if rows else None


def _row(cell: Cell, other: Cell, metric: str) -> Row:
    kept, closed = (each.record["scores"][metric] for each in (cell, other))
    name = cell.variant.removesuffix(f" [{cell.record['config']['positions']}]")
    return Row(
        [
            Entry(name, name),
            Entry(cell.budget, cell.budget),
            score_entry(cell, metric),
            score_entry(other, metric),
            signed_entry(difference(kept, closed), scale(kept)),
        ],
        cell,
    )


def _mode(record: Record) -> str | None:
    """What was asked for, or else what the method's paper has."""
    return record["config"]["positions"] or record["positions"]


def _but_positions(record: Record) -> str:
    return str(record["config"]["methods"])

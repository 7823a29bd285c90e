"""Methods beside the dense model in a report: answers that stayed, and outcomes that turned."""

from __future__ import annotations

from ..results.agreement import Agreement, agreement
from .cells import Cell, Section
from .grids import Entry, Grid, Row, difference_entry, score_entry


def agreement_table(section: Section) -> Grid | None:
    """None where there is no dense cell, or nothing that can be paired with it."""
    name, dense = section.main, section.dense
    if name is None or dense is None:
        return None
    rows = [
        _row(section, cell, name, found)
        for cell in section.done
        if not cell.dense and (found := agreement(cell.record, dense.record, name)) is not None
    ]
    headers = [
        *("Method", "Budget", "Score", "vs dense"),
        *("Same answers %", "Right to wrong", "Wrong to right"),
    ]
    return Grid(headers, rows) if rows else None


def _row(section: Section, cell: Cell, metric: str, found: Agreement) -> Row:
    same = found.same_answers
    return Row(
        [
            Entry(cell.variant, cell.variant),
            Entry(cell.budget, cell.budget),
            score_entry(cell, metric),
            difference_entry(section, cell, metric),
            Entry("" if same is None else f"{100 * same:.1f}", same),
            _count(found.turned_wrong),
            _count(found.turned_right),
        ],
        cell,
    )


def _count(number: int | None) -> Entry:
    return Entry("" if number is None else str(number), number)

"""The second question about a picture in a report, beside the same question asked first."""

from __future__ import annotations

from ..embedded.turns import FIRST, SECOND
from ..results.statistics import difference
from ..results.texts import scale
from .cells import Cell, Section
from .grids import Entry, Grid, Row, score_entry, signed_entry

NOTE = (
    "The same questions, asked first and asked behind another one about the picture, on the tokens "
    "that it left; paired. Kept alike: the share of tokens that both questions of a couple keep; "
    "100 % of a choice that does not look at the question. Evidence: of the second question's "
    "patches those that the first one left. Neither is known of methods on the cache."
)


def turns_table(section: Section) -> Grid | None:
    """None where no second turns were asked."""
    rows = [_row(cell) for cell in section.done if {FIRST, SECOND} <= cell.record["scores"].keys()]
    headers = [
        *("Method", "Budget", "Asked first", "Asked second", "Second - first"),
        *("Kept alike %", "Evidence kept %"),
    ]
    return Grid(headers, rows) if rows else None


def _row(cell: Cell) -> Row:
    scores, alike = cell.record["scores"], cell.record.get("kept_alike")
    evidence = cell.record.get("evidence") if alike is not None else None
    return Row(
        [
            Entry(cell.variant, cell.variant),
            Entry(cell.budget, cell.budget),
            score_entry(cell, FIRST),
            score_entry(cell, SECOND),
            signed_entry(difference(scores[SECOND], scores[FIRST]), scale(scores[SECOND])),
            _percent(alike),
            _percent(evidence["mean"] if evidence else None),
        ],
        cell,
    )


def _percent(share: float | None) -> Entry:
    return Entry("" if share is None else f"{100 * share:.1f}", share)

"""Where methods keep tokens, over all questions: maps, what they lean to, and the evidence among
them."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from io import BytesIO
from statistics import fmean

from PIL import Image

from ..results.records import WhereKept
from .cells import Cell, Section
from .grids import Entry, Grid, Row

NOTE = "Even: 1.00. Evidence: the patches that a question is about, where the task knows them."
MAPS = (
    "Maps: how often a token was kept over each point of the pictures, from white (never) to dark "
    "(twice as often as on average, or more)."
)
_PIXELS = 8  # of a point
_RING = 2  # points of the border


def where_table(section: Section) -> Grid | None:
    """None where no cell knows where its tokens were."""
    rows = [_row(cell, cell.record["where"]) for cell in section.done if "where" in cell.record]
    headers = [
        *("Method", "Budget", "Kept %", "Lower / upper half", "Border / middle"),
        *("Evidence kept %", "of right answers", "of wrong answers"),
    ]
    return Grid(headers, rows) if rows else None


def maps(section: Section) -> Iterator[tuple[Cell, str]]:
    """Each cell that knows it, with its map as a `data:` URI."""
    for cell in section.done:
        if "where" in cell.record:
            yield cell, _map(cell.record["where"])


def _row(cell: Cell, where: WhereKept) -> Row:
    side, percent = where["side"], where["percent"]
    upper, lower, ring, middle = list[int](), list[int](), list[int](), list[int]()
    for point, value in enumerate(percent):
        row, column = divmod(point, side)
        (upper if 2 * row < side else lower).append(value)
        edge = min(row, column, side - 1 - row, side - 1 - column)
        (ring if edge < _RING else middle).append(value)
    evidence = cell.record.get("evidence")
    return Row(
        [
            Entry(cell.variant, cell.variant),
            Entry(cell.budget, cell.budget),
            Entry(f"{fmean(percent):.1f}", fmean(percent)),
            _ratio(lower, upper),
            _ratio(ring, middle),
            *(_percent(evidence[key] if evidence else None) for key in ("mean", "right", "wrong")),
        ],
        cell,
    )


def _ratio(these: list[int], those: list[int]) -> Entry:
    ratio = fmean(these) / fmean(those) if any(those) else None
    return Entry("" if ratio is None else f"{ratio:.2f}", ratio)


def _percent(share: float | None) -> Entry:
    return Entry("" if share is None else f"{100 * share:.1f}", share)


def _map(where: WhereKept) -> str:
    side, percent = where["side"], where["percent"]
    most = 2 * fmean(percent) or 1
    picture = Image.new("L", (side, side))
    picture.putdata([round(255 * (1 - min(1.0, value / most))) for value in percent])
    large = picture.resize((side * _PIXELS, side * _PIXELS), Image.Resampling.NEAREST)
    content = BytesIO()
    large.save(content, format="png", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}"

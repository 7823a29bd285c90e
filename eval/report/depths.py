"""Cuts in the decoder by their depth in a report, each beside a choice by chance in front of the
same layer."""

from __future__ import annotations

from ..results.records import Record, method_name
from ..results.statistics import difference
from ..results.texts import scale
from .cells import Cell, Section
from .grids import Entry, Grid, Row, score_entry, signed_entry

CHANCE = "random_decoder"
NOTE = (
    f"Layer: the first that sees fewer tokens. By chance: {CHANCE} in front of the same layer, "
    "under the same budget; paired, with 95 % intervals."
)


def depths_table(section: Section) -> Grid | None:
    """None where no method stands beside chance at its layer."""
    metric = section.main
    by_chance = {_place(c.record): c for c in section.done if method_name(c.record) == CHANCE}
    if metric is None:
        return None
    names = list(dict.fromkeys(method_name(cell.record) for cell in section.done))

    def order(cell: Cell) -> tuple[int, int]:
        return names.index(method_name(cell.record)), _layer(cell.record) or 0

    rows = [
        _row(cell, by_chance[place], metric)
        for cell in sorted(section.done, key=order)
        if (place := _place(cell.record)) in by_chance and method_name(cell.record) != CHANCE
    ]
    headers = ["Method", "Budget", "Layer", "Tokens a layer", "Score", "By chance", "vs chance"]
    return Grid(headers, rows) if rows else None


def _row(cell: Cell, other: Cell, metric: str) -> Row:
    tokens = float(cell.record["tokens"]["average_per_layer"])
    score, chance = (each.record["scores"][metric] for each in (cell, other))
    layer = _layer(cell.record)
    return Row(
        [
            Entry(method_name(cell.record), method_name(cell.record)),
            Entry(cell.budget, cell.budget),
            Entry(str(layer), layer),
            Entry(f"{tokens:.1f}", tokens),
            score_entry(cell, metric),
            score_entry(other, metric),
            signed_entry(difference(score, chance), scale(score)),
        ],
        cell,
    )


def _place(record: Record) -> tuple[int | None, str]:
    """Where a cell cuts, and how far."""
    methods = record["config"]["methods"]
    return _layer(record), str([method["budget"] for method in methods])


def _layer(record: Record) -> int | None:
    """The layer of a cell with one method that says it as a field; None: no such cell."""
    methods = record["config"]["methods"]
    layer = methods[0]["fields"].get("layer") if len(methods) == 1 else None
    return layer if isinstance(layer, int) else None

"""Methods beside baselines at equal tokens in a report, and on the questions that `downsample`
fails."""

from __future__ import annotations

from ..results.baselines import BASELINES, at_equal_tokens, hard
from ..results.records import Record, budget_text, method_name
from ..results.statistics import Score, difference
from ..results.texts import scale, with_interval
from .cells import Cell, Section, finite
from .grids import Entry, Grid, Row, score_entry, signed_entry

BESIDE = (
    "Points above the baseline's cell with the nearest mean of tokens a layer (entries, on the "
    "cache), at most a quarter apart; paired, with 95 % intervals."
)
HARD = (
    "Hard: the questions that the cell of downsample beside it answers wrong, at about as many "
    "tokens a layer; paired with the dense model on the same ones. The rest: all others."
)


def beside_baselines(section: Section) -> Grid | None:
    """None where no method stands beside a baseline."""
    metric, records = section.main, [cell.record for cell in section.done]
    names = [name for name in BASELINES if name in map(method_name, records)]
    if metric is None or not names:
        return None
    rows = []
    for cell in section.done:
        others = [at_equal_tokens(cell.record, records, name) for name in names]
        if any(others) and metric in cell.record["scores"]:
            above = (_above(cell.record, other, metric) for other in others)
            rows.append(Row([*_head(cell), score_entry(cell, metric), *above], cell))
    headers = ["Method", "Budget", "Score", *(f"vs {name}" for name in names)]
    return Grid(headers, rows) if rows else None


def hard_table(section: Section) -> Grid | None:
    """None where `downsample` stands beside no cell."""
    metric, records = section.main, [cell.record for cell in section.done]
    dense = section.dense.record if section.dense else None
    rows = []
    for cell in section.done:
        found = hard(cell.record, records, dense, metric) if metric else None
        if found is not None:
            entries = [
                Entry(budget_text(found.beside), found.beside["tokens"]["average_per_layer"]),
                Entry(str(found.score["n"]), found.score["n"]),
                _score(found.score),
                _score(found.dense),
                signed_entry(found.above_dense, scale(found.score)),
                _score(found.rest),
            ]
            rows.append(Row([*_head(cell), *entries], cell))
    headers = [
        *("Method", "Budget", "Downsample at", "Hard questions"),
        *("Score on them", "Dense on them", "vs dense", "Score on the rest"),
    ]
    return Grid(headers, rows) if rows else None


def _head(cell: Cell) -> list[Entry]:
    return [Entry(cell.variant, cell.variant), Entry(cell.budget, cell.budget)]


def _above(record: Record, other: Record | None, metric: str) -> Entry:
    if other is None or metric not in other["scores"]:
        return Entry("")
    score = record["scores"][metric]
    return signed_entry(difference(score, other["scores"][metric]), scale(score))


def _score(score: Score | None) -> Entry:
    if score is None:
        return Entry("")
    return Entry(with_interval(score), finite(score["value"]))

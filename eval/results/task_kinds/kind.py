"""What tables, charts and files show of a kind of task, beside scores and what was run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Finished = Mapping[str, Any]
"""A record of a finished cell."""
Value = Callable[[Finished], float | None]


@dataclass(frozen=True)
class Column:
    """A quantity in tables: as text, and as the number that a column is sorted by."""

    header: str
    text: Callable[[Finished], str]
    value: Value


@dataclass(frozen=True)
class Cost:
    """What a point pays, for the horizontal axis of the frontier."""

    key: str
    label: str
    digits: int
    value: Value


@dataclass(frozen=True)
class Mean:
    """A quantity in a table for a paper, where it is a mean over tasks. `header` is LaTeX."""

    header: str
    value: Value
    digits: int = 1


@dataclass(frozen=True, kw_only=True)
class TaskKind:
    """
    Attributes:
        name: as `Config.task_kind` has it.
        item: what is asked or shown.
        costs: the first is the share of dense that orders cells and decides what is on the
            frontier, in percent.
        columns: of a report's table; `short` of the one in a terminal, where those numbered
            `droppable` may be left out, first to last.
        notes, short_notes: what they mean; `{}` is the score.
        means: of a table for a paper; `paper_notes` is LaTeX.
        numbers: all of it as one flat row, with plain values.
        output_type: what lm-eval's files call it.
        parts: keys of a record that hold what was measured, beside scores.
    """

    name: str
    item: str
    costs: tuple[Cost, ...]
    columns: tuple[Column, ...]
    notes: str
    short: tuple[Column, ...]
    short_notes: str
    droppable: tuple[int, ...]
    means: tuple[Mean, ...]
    paper_notes: tuple[str, ...]
    numbers: Callable[[Finished], dict[str, Any]]
    output_type: str
    parts: tuple[str, ...]

    def share(self, record: Finished) -> float:
        """Of what dense pays, in percent; infinite where that is not known."""
        value = self.costs[0].value(record)
        return float("inf") if value is None else value

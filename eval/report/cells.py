"""What a report shows: the cells of result files, in sections whose scores may be compared."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...prune.errors import VlmpruneError
from ..environment import describe
from ..results.records import (
    Record,
    ResultsError,
    budget_text,
    earlier_text,
    latest,
    main_score,
    method_name,
    setting_of,
    variant,
)
from ..results.statistics import Score, difference
from ..results.store import read_records
from ..results.sweep_table import in_order
from ..results.task_kinds import Cost, TaskKind, kind_of
from ..results.texts import scale

STATUSES = ("ok", "failed", "not_applicable")


@dataclass(frozen=True)
class Cell:
    """A record and the folder that its pictures and samples are below."""

    record: Record
    folder: Path

    @property
    def ok(self) -> bool:
        return self.record["status"] == "ok"

    @property
    def dense(self) -> bool:
        return method_name(self.record) == "dense"

    @property
    def variant(self) -> str:
        return variant(self.record)

    @property
    def budget(self) -> str:
        return budget_text(self.record)

    @property
    def name(self) -> str:
        """Variant and budget, as in a caption."""
        return f"{self.variant} @ {self.budget}" if self.budget else self.variant

    @property
    def reason(self) -> str:
        """Why there are no numbers."""
        error = self.record.get("error") or {}
        return f"{error.get('type', 'Error')}: {error.get('message', 'no message was recorded')}"


@dataclass(frozen=True)
class Section:
    """The cells of one setting (model, task, questions, seed): dense first, then by method."""

    cells: list[Cell]

    @property
    def config(self) -> Mapping[str, Any]:
        return self.cells[0].record["config"]

    @property
    def kind(self) -> TaskKind:
        """What is measured, and how it is shown."""
        return kind_of(self.config)

    @property
    def done(self) -> list[Cell]:
        return [cell for cell in self.cells if cell.ok]

    @property
    def missing(self) -> list[Cell]:
        """Cells without numbers: failed, or not applicable."""
        return [cell for cell in self.cells if not cell.ok]

    @property
    def dense(self) -> Cell | None:
        return next((cell for cell in self.done if cell.dense), None)

    @property
    def metrics(self) -> dict[str, Score]:
        """Every metric, the task's main one first, with a score as an example of its unit."""
        found: dict[str, Score] = {}
        for cell in self.done:
            for name, score in cell.record["scores"].items():
                found.setdefault(name, score)
        return found

    @property
    def main(self) -> str | None:
        """The task's main metric."""
        return next((main_score(cell.record)[0] for cell in self.done), None)

    def against_dense(
        self, cell: Cell, metric: str
    ) -> tuple[float, float | None, float | None] | None:
        """Paired difference to dense with its interval; None for dense, or where dense has none."""
        dense = self.dense
        if dense is None or cell.dense or metric not in cell.record["scores"]:
            return None
        beside = dense.record["scores"].get(metric)
        return difference(cell.record["scores"][metric], beside) if beside else None

    @property
    def hardware(self) -> list[str]:
        return _distinct(describe(cell.record["hardware"]) for cell in self.cells)

    @property
    def earlier(self) -> str | None:
        """Whose cells of another code are not shown."""
        return earlier_text([cell.record for cell in self.cells])

    @property
    def versions(self) -> list[str]:
        return _distinct(
            ", ".join(f"{name} {version}" for name, version in cell.record["versions"].items())
            for cell in self.cells
        )


def read_cells(paths: Sequence[Path]) -> list[Cell]:
    """The cells of all files; one that is in several is shown as the last file has it, unless only
    an earlier one has numbers.

    Raises:
        ResultsError: a file that cannot be read, has no cells, or is no result of a sweep.
    """
    found: dict[str, Cell] = {}
    for path in paths:
        try:
            records = read_records(path)
            for record in records:
                _check(record)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            if isinstance(error, VlmpruneError):
                raise
            raise ResultsError(
                f"{str(path)!r} is no result of vlmprune ({type(error).__name__}: {error}):"
                f" give a runs.jsonl, or the folder that it is in."
            ) from error
        if not records:
            raise ResultsError(
                f"{str(path)!r} has no cells: run `vlmprune sweep -o DIR` first, then `vlmprune "
                f"report DIR`."
            )
        folder = path if path.is_dir() else path.parent
        for record in records:
            known = found.get(record["id"])
            if known is None or record["status"] == "ok" or not known.ok:
                found[record["id"]] = Cell(record, folder)
    folder_of = {id_: cell.folder for id_, cell in found.items()}
    shown = latest([cell.record for cell in found.values()])
    return [Cell(record, folder_of[record["id"]]) for record in shown]


def sections(cells: Sequence[Cell]) -> list[Section]:
    """Cells by setting, in the order in which settings first appeared."""
    by_setting: dict[tuple[object, ...], list[Cell]] = {}
    for cell in cells:
        by_setting.setdefault(setting_of(cell.record), []).append(cell)
    return [Section(_in_order(group)) for group in by_setting.values()]


def _in_order(cells: Sequence[Cell]) -> list[Cell]:
    cell_of = {cell.record["id"]: cell for cell in cells}
    return [cell_of[record["id"]] for record in in_order([cell.record for cell in cells])]


def _check(record: Record) -> None:
    """Touch what every report reads, so that a foreign file is refused and not half shown.

    Raises:
        KeyError, TypeError, AttributeError, ValueError: it is no record of a sweep.
    """
    for part in ("id", "finished"):
        if not isinstance(record[part], str):  # type: ignore[literal-required]
            raise TypeError(f"{part} is {record[part]!r}")  # type: ignore[literal-required]
    if record["status"] not in STATUSES:
        raise ValueError(f"status is {record['status']!r}")
    setting_of(record)
    variant(record)
    budget_text(record)
    describe(record["hardware"])
    record["versions"].items()
    kind = kind_of(record["config"])
    if record["status"] != "ok":
        return
    if not record["scores"]:
        raise ValueError("scores are empty")
    for score in record["scores"].values():
        scale(score) * float(score["value"])
        difference(score, score)
    kind.numbers(record)
    for cost in kind.costs:
        cost_of(record, cost)
    for example in record["examples"]:
        example["question"], example["answer"], example["prediction"], example["picture"]


def pareto(
    points: Sequence[tuple[float | None, float | None]], *, higher_is_better: bool
) -> list[int]:
    """Which (cost, score) no other point beats: none is both as cheap and as good, and better in
    one of the two. By rising cost."""
    sign = 1 if higher_is_better else -1
    known = sorted(
        (cost, -sign * score, index)
        for index, (cost, score) in enumerate(points)
        if cost is not None and score is not None
    )
    best, last, kept = math.inf, math.inf, list[int]()
    for cost, worse, index in known:
        if worse < best or (worse == best and cost == last):
            kept.append(index)
            best, last = worse, cost
    return kept


def cost_of(record: Record, cost: Cost) -> float | None:
    """None where it is not known, or is no number that an axis can hold."""
    return finite(cost.value(record))


def finite(value: float | None) -> float | None:
    """None in place of what neither JSON nor an axis can hold."""
    return value if value is not None and math.isfinite(value) else None


def _distinct(texts: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(texts))

"""Results as a pandas data frame: one row a cell, or a method of a comparison."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ...prune.errors import VlmpruneError
from . import flat
from .records import Record, main_score, method_name, setting_of
from .task_kinds import ANSWERS, kind_of

if TYPE_CHECKING:
    import pandas as pd


class MissingPackageError(VlmpruneError, ImportError):
    """A package that is needed for this alone, and is not installed.

    Symptom: `to_frame()` stops.
    Cause: data frames need pandas, which vlmprune does without otherwise.
    Type: `pip install pandas`.
    Page: ERRORS.md#missingpackageerror
    """


class Results(list[Record]):
    """The records of a sweep, one a cell: a list, and `to_frame()` as a table to calculate with."""

    def to_frame(self) -> pd.DataFrame:
        """One row a cell; see the function of this name.

        Raises:
            MissingPackageError: pandas is not installed.
        """
        return to_frame(self)


def to_frame(records: Sequence[Record]) -> pd.DataFrame:
    """One row a cell, with the names of `vlmprune report -o numbers.csv`.

    `value` is the task's main metric, `vs_dense` what it is above the dense cell of its setting,
    paired; tasks with several metrics have each in `score_NAME`. `name`, `fields` (a dict),
    `budget_word` and `budget_value` take the method apart, `version_PACKAGE` says what ran.
    Numbers of cells without any (failed, not applicable) are missing.

    Raises:
        MissingPackageError: pandas is not installed.
    """
    pandas = _pandas()
    dense = {
        setting_of(record): record
        for record in records
        if method_name(record) == "dense" and record["status"] == "ok"
    }
    rows = [_row(record, dense.get(setting_of(record))) for record in records]
    fullest_first = sorted(rows, key=len, reverse=True)
    frame = pandas.DataFrame(rows, columns=list(dict.fromkeys(k for r in fullest_first for k in r)))
    if rows:
        frame["finished"] = pandas.to_datetime(frame["finished"])
    return frame


def comparison_frame(rows: Sequence[tuple[Mapping[str, Any], Mapping[str, Any] | None]]) -> Any:
    """What is said of each method, and what was measured of it, if anything.

    Raises:
        MissingPackageError: pandas is not installed.
    """
    pandas = _pandas()
    return pandas.DataFrame(
        [{**said, **(ANSWERS.numbers(measured) if measured else {})} for said, measured in rows]
    )


def _row(record: Record, dense: Record | None) -> dict[str, Any]:
    row = {**flat.head(record), **flat.parts(record)}
    if record["status"] == "ok":
        row |= flat.score(record, main_score(record)[0], dense)
        if len(record["scores"]) > 1:
            row |= {f"score_{name}": score["value"] for name, score in record["scores"].items()}
        row |= kind_of(record["config"]).numbers(record)
    return row | flat.tail(record) | flat.machine(record)


def _pandas() -> Any:
    try:
        import pandas
    except ImportError as error:
        raise MissingPackageError(
            "Data frames need pandas, which vlmprune does without otherwise: pip install pandas."
        ) from error
    return pandas

"""The result file: `runs.jsonl`, one finished cell a line, appended at once and never rewritten.

The schema counts what older readers would misread or trip over; fields that they may ignore do not
change it. Older schemas are brought up to date when they are read. 2: `config` may hold `kinds`.
3: `scores` by metric in place of `accuracy`, `examples`, and `config` may hold `model_args`.
4: `config` may hold another `task_kind` than questions, whose records measure other things.
"""

from __future__ import annotations

import json
import os
from io import FileIO
from pathlib import Path
from typing import Any

from .frame import Results
from .records import Record, ResultsError, latest
from .statistics import Score

SCHEMA = 4
FILE_NAME = "runs.jsonl"


class UnwrittenError(ResultsError):
    """A finished cell that the disk does not take; `record` is what was measured.

    Symptom: a sweep ends in the middle.
    Cause: the disk is full, or the file may not be written any more.
    Type: make room, then the same command: it goes on where it stopped.
    Page: ERRORS.md#unwrittenerror
    """

    def __init__(self, message: str, record: Record) -> None:
        super().__init__(message, record)
        self.record = record

    def __str__(self) -> str:
        return str(self.args[0])


class Store:
    """Appends records to `runs.jsonl` in a folder, and reads them back."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / FILE_NAME
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._end_torn_line()
        except OSError as error:
            raise ResultsError(
                f"Results cannot be written to {folder} ({error.strerror}): choose another folder "
                f"with --output_path."
            ) from error

    def append(self, record: Record) -> None:
        """Write one line, on the disk when this returns; or nothing of it.

        Raises:
            UnwrittenError: the disk is full, or the file cannot be written any more.
        """
        line = json.dumps(record, default=str, allow_nan=False) + "\n"
        try:
            with open(self.path, "ab", buffering=0) as file:
                start = file.tell()
                try:
                    _write_all(file, line.encode())
                    os.fsync(file.fileno())
                except OSError:
                    file.truncate(start)
                    raise
        except OSError as error:
            raise UnwrittenError(
                f"{self.path} cannot be written ({error.strerror}), so that the sweep ends here: "
                f"make room, then the same command goes on.",
                record,
            ) from error

    def read(self) -> list[Record]:
        """The last record of every id, of any code; see `read_records`."""
        return list(_read(self.path).values()) if self.path.exists() else []

    def _end_torn_line(self) -> None:
        """Give a line that an interrupt cut short its end, so that the next one starts afresh."""
        if not self.path.exists() or not self.path.stat().st_size:
            return
        with open(self.path, "rb+") as file:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")


def _write_all(file: FileIO, content: bytes) -> None:
    while content:
        content = content[file.write(content) :]


def read_records(path: str | os.PathLike[str]) -> Results:
    """The last record of every id, in the order in which ids first appeared; of a method that was
    edited in between only the cells of the code that a sweep used last (see `latest`).

    A line that an interrupt tore is left out: that cell counts as not run.

    Args:
        path: a `runs.jsonl`, or the folder that it is in.

    Raises:
        ResultsError: there is no such file, a newer vlmprune wrote it, or it holds no questions.
    """
    return Results(latest(list(_read(Path(path)).values())))


def _read(path: Path) -> dict[str, Record]:
    """The last record of every id; one with numbers goes before a later one without."""
    file = path / FILE_NAME if path.is_dir() else path
    try:
        lines = file.read_bytes().split(b"\n")
    except OSError as error:
        raise ResultsError(
            f"{str(file)!r} cannot be read ({error.strerror}): give a {FILE_NAME} of `vlmprune "
            f"sweep`, or its folder."
        ) from error
    records: dict[str, Record] = {}
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            known = record["schema"]
        except (ValueError, KeyError, TypeError):
            continue
        if known > SCHEMA:
            raise ResultsError(
                f"{file}, line {number} was written by a newer vlmprune (schema {known}, this one "
                f"reads {SCHEMA}): upgrade, or choose another --output_path."
            )
        before = records.get(record["id"])
        if before is None or before["status"] != "ok" or record["status"] == "ok":
            records[record["id"]] = _up_to_date(record)
    return records


def _up_to_date(record: dict[str, Any]) -> Record:
    """A record of any older schema in the present one."""
    if "accuracy" in record:
        old = record.pop("accuracy")
        score = Score(
            value=old["value"],
            unit="share",
            n=old["n"],
            low=old["low"],
            high=old["high"],
            higher_is_better=True,
            by_kind=old["by_kind"],
            outcomes=[float(c) for c in old["outcomes"]],
            replicates=[],
        )
        record |= {"scores": {"accuracy": score}, "examples": []}
    return record  # type: ignore[return-value]

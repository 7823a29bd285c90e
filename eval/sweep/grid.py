"""A grid of methods x budgets: finished cells are on disk at once, and skipped the next time."""

from __future__ import annotations

import logging
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from typing import Any

from ...prune.budget import MethodCall
from ...prune.errors import (
    BudgetError,
    MethodFieldError,
    MissingSignalError,
    UnsupportedFeatureError,
    UnsupportedModelError,
)
from ..environment import load_average
from ..processes import Processes
from ..results.records import Config, Measured, MeasuredClasses, Record, latest
from ..results.store import SCHEMA, Store
from ..sources import UNKNOWN, Source
from ..words.parts import Parts
from ..words.said import parts_text

logger = logging.getLogger(__name__)

_NAMED = 3  # as many skipped cells are named

REFUSALS = (
    MissingSignalError,
    UnsupportedFeatureError,
    UnsupportedModelError,
    BudgetError,
    MethodFieldError,
)
"""Errors that say: this method cannot do this on this model. They are results, not failures."""


@dataclass(frozen=True)
class Cell:
    """One run: a configuration, and what to patch with (nothing: the dense model)."""

    config: Config
    parts: Parts

    @property
    def calls(self) -> tuple[MethodCall, ...]:
        """What `patch` takes.

        Raises:
            BudgetError: a method cannot run with its budget.
        """
        return tuple(part.call for part in self.parts)

    def __str__(self) -> str:
        return parts_text(self.parts, self.config.seed)


@dataclass
class Summary:
    """Cells of a sweep by what became of them, with the reason. `skipped` were finished before, as
    their records say."""

    ok: list[Cell] = field(default_factory=list)
    not_applicable: list[tuple[Cell, str]] = field(default_factory=list)
    failed: list[tuple[Cell, str]] = field(default_factory=list)
    skipped: list[tuple[Cell, Record]] = field(default_factory=list)

    def skipped_lines(self) -> list[str]:
        """What was skipped, with when and with which versions it was measured."""
        by_origin: dict[str, list[Cell]] = {}
        for cell, record in self.skipped:
            versions = ", ".join(
                f"{name} {record['versions'][name]}"
                for name in ("vlmprune", "torch", "transformers")
                if name in record["versions"]
            )
            by_origin.setdefault(f"{record['finished'][:10]} with {versions}", []).append(cell)
        return [
            f"skipped: {_named(cells)}, measured {origin}" for origin, cells in by_origin.items()
        ]


def sweep(
    cells: Sequence[Cell],
    run: Callable[[Cell], Measured | MeasuredClasses],
    store: Store | None,
    *,
    batch_size: int,
    versions: Mapping[str, str],
    hardware: Mapping[str, object],
    on_cell: Callable[[Cell], None] = lambda cell: None,
    processes: Processes | None = None,
    rerun: bool = False,
    given: Callable[[Config], Mapping[str, object]] | None = None,
) -> Summary:
    """Run the cells that `store` does not hold yet and append each as it finishes.

    A cell that raises is recorded as failed, with its error, and tried again by the next sweep. An
    interrupt leaves everything that was finished.

    Args:
        run: evaluates one cell, in all processes together.
        store: where finished cells are; None in all processes but the first.
        on_cell: called for every cell before it is run.
        rerun: run all cells, also those that `store` holds.
        given: flags of the command that a cell's configuration does not tell.

    Raises:
        UnwrittenError: the disk does not take a finished cell, which the error holds.
    """
    processes = processes or Processes()
    records = processes.from_first(lambda: store.read() if store else [])
    known = {} if rerun else {record["id"]: record for record in records}
    shown = {record["id"] for record in latest(records)}
    summary = Summary()
    _warn_of_unknown(cells)
    _warn_of_changes(
        [known[c.config.id] for c in cells if c.config.id in known], versions, hardware
    )
    for cell in cells:
        before = known.get(cell.config.id) if cell.config.known else None
        if before is not None and _finished(before, versions):
            summary.skipped.append((cell, before))
            if before["id"] not in shown:  # an edit was taken back
                processes.from_first(partial(_append, store, before | {"asked": _now()}))
            continue
        on_cell(cell)
        started = time.perf_counter()
        outcome = _outcome(cell, run, summary)
        told: dict[str, Any] = {"given": dict(given(cell.config))} if given else {}
        finished = Record(
            schema=SCHEMA,
            id=cell.config.id,
            config=cell.config.as_json(),
            finished=_now(),
            seconds=round(time.perf_counter() - started, 3),
            batch_size=batch_size,
            load_average=load_average(),
            versions=dict(versions),
            hardware=dict(hardware),
            **(told | outcome),  # type: ignore[typeddict-item]
        )
        processes.from_first(partial(_append, store, finished))
    return summary


def _outcome(
    cell: Cell, run: Callable[[Cell], Measured | MeasuredClasses], summary: Summary
) -> dict[str, Any]:
    """What is recorded of a cell once it is run, of whatever comes out of it."""
    try:
        measured = run(cell)
    except REFUSALS as refusal:
        summary.not_applicable.append((cell, str(refusal)))
        return {"status": "not_applicable", "error": _error(refusal)}
    except Exception as error:
        summary.failed.append((cell, f"{type(error).__name__}: {error}"))
        logger.info("%s failed", cell, exc_info=True)
        trace = "".join(traceback.format_exception(error))
        return {"status": "failed", "error": _error(error) | {"traceback": trace}}
    summary.ok.append(cell)
    return {"status": "ok", **measured}


def _append(store: Store | None, record: Record) -> None:
    if store is not None:
        store.append(record)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _named(cells: Sequence[Cell]) -> str:
    return f"{len(cells)} cells" if len(cells) > _NAMED else ", ".join(map(str, cells))


def _finished(record: Record, versions: Mapping[str, str]) -> bool:
    """A refusal of another version is asked again: it may be supported by now."""
    if record["status"] == "not_applicable":
        return record["versions"] == versions
    return record["status"] == "ok"


def _error(error: Exception) -> dict[str, str]:
    return {"type": type(error).__name__, "message": str(error)}


def _warn_of_unknown(cells: Sequence[Cell]) -> None:
    """Say so if a code is not known, so that no cell of it can be taken for finished."""
    methods = dict.fromkeys(type(part.method) for cell in cells for part in cell.parts)
    reasons = {f"method {cls.name}": Source(cls).gaps for cls in methods}
    reasons |= {
        f"task {cell.config.task}": ["the source of its class cannot be had"]
        for cell in cells
        if cell.config.task_version.endswith(UNKNOWN)
    }
    for what, gaps in reasons.items():
        if gaps:
            logger.warning(
                "%s: nobody can tell whether its code is still the same (%s): its cells are "
                "measured anew every time.",
                what,
                "; ".join(dict.fromkeys(gaps)),
            )


def _warn_of_changes(
    records: Sequence[Record], versions: Mapping[str, str], hardware: Mapping[str, object]
) -> None:
    """Say so if finished cells come from other versions or another machine than this run."""
    for what, now in (("versions", versions), ("hardware", hardware)):
        changed: dict[str, set[str]] = {}
        for record in records:
            then: Mapping[str, object] = record[what]  # type: ignore[literal-required]
            for key in {*now, *then}:
                if then.get(key) != now.get(key):
                    changed.setdefault(key, set()).add(f"{then.get(key)} -> {now.get(key)}")
        if changed:
            listed = "; ".join(f"{k} {', '.join(sorted(v))}" for k, v in sorted(changed.items()))
            logger.warning(
                "Finished cells were measured with other %s (%s): --rerun measures them again.",
                what,
                listed,
            )

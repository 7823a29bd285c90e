"""The grid of a classifier: `classify.jsonl` holds every finished cell, a later run the others.

Its records are not those of a sweep, which tell of prompts, decoders and caches: schema 1 of its
own, which `vlmprune report` does not read.
"""

from __future__ import annotations

import hashlib
import json
import logging
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, cast

from ..environment import hardware, load_average, versions
from ..results.records import Record, method_record
from ..results.store import Store
from ..sources import UNKNOWN
from ..words.parts import Parts
from ..words.said import parts_text
from .classifier import Classifier
from .measuring import measure
from .pictures import Pictures
from .request import ClassifyRequest

logger = logging.getLogger(__name__)

KIND = "classify"
SCHEMA = 1
FILE_NAME = "classify.jsonl"


@dataclass(frozen=True)
class Cell:
    """A method, or several, and everything that decides what comes out."""

    parts: Parts
    config: dict[str, Any]

    @property
    def id(self) -> str:
        """The first 16 hex digits of the sha256 of the configuration."""
        text = json.dumps(self.config, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def known(self) -> bool:
        """Whether another run can be told to be the same: all code of methods has a hash."""
        return UNKNOWN not in [method.get("source") for method in self.config["methods"]]

    def __str__(self) -> str:
        return parts_text(self.parts, self.config["seed"])


def cells_of(
    combinations: Sequence[Parts],
    request: ClassifyRequest,
    classifier: Classifier,
    pictures: Pictures,
    device: str,
) -> list[Cell]:
    shared = {
        "model": request.model,
        "fingerprint": classifier.fingerprint,
        "data": pictures.digest,
        "classes": sorted(pictures.numbers.items()),
        "pictures": len(pictures.files),
        "batch_size": request.batch_size,
        "dtype": request.dtype,
        "device": device,
        "seed": request.seed,
    }
    return [
        Cell(parts, {**shared, "methods": [method_record(part) for part in parts]})
        for parts in combinations
    ]


def run_cells(
    cells: Sequence[Cell],
    classifier: Classifier,
    pictures: Pictures,
    store: Store,
    *,
    rerun: bool,
    on_cell: Callable[[Cell], None] = lambda cell: None,
) -> tuple[list[dict[str, Any]], int]:
    """A record for every cell, and how many of them were there already.

    A cell that raises is recorded as failed, with its error, and tried again by the next run.

    Raises:
        UnwrittenError: the disk does not take a finished cell, which the error holds.
    """
    known = {} if rerun else {record["id"]: dict(record) for record in store.read()}
    found, there = [], 0
    for cell in cells:
        on_cell(cell)
        before = known.get(cell.id)
        if before is not None and before["status"] == "ok" and cell.known:
            found.append(before)
            there += 1
            continue
        record = _run(cell, classifier, pictures)
        store.append(cast(Record, record))
        found.append(record)
    return found, there


def _run(cell: Cell, classifier: Classifier, pictures: Pictures) -> dict[str, Any]:
    record: dict[str, Any] = {
        "schema": SCHEMA,
        "kind": KIND,
        "id": cell.id,
        "config": json.loads(json.dumps(cell.config, default=str)),
        "versions": versions(),
        "hardware": hardware(cell.config["device"]),
        "load_average": load_average(),
    }
    try:
        measured = measure(
            classifier,
            pictures,
            [part.call for part in cell.parts],
            batch_size=cell.config["batch_size"],
            seed=cell.config["seed"],
        )
    except Exception as error:
        logger.info("%s failed", cell, exc_info=True)
        record |= {
            "status": "failed",
            "error": {
                "type": type(error).__name__,
                "message": str(error),
                "traceback": "".join(traceback.format_exception(error)),
            },
        }
    else:
        record |= {"status": "ok", **measured}
    return record | {"finished": datetime.now(UTC).isoformat(timespec="seconds")}

"""A report as CSV: one row a cell and metric, numbers in full."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence
from typing import Any

from ..stats import Spread
from . import escape
from .cells import Cell, Section
from .repeat import command_of

_SPREADS = (
    "first_token",
    "vision",
    "select",
    "prefill",
    "per_decoded_token",
    "dense_first_token",
    "share_of_dense",
)


def render(sections: Sequence[Section]) -> str:
    """All cells; those without numbers have a row with their error."""
    rows = [row for section in sections for cell in section.cells for row in _rows(section, cell)]
    fullest_first = sorted(rows, key=len, reverse=True)
    headers = list(dict.fromkeys(key for row in fullest_first for key in row))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\r\n")
    writer.writerow(headers)
    for row in rows:
        writer.writerow([escape.csv(row.get(header, "")) for header in headers])
    return text.getvalue()


def _rows(section: Section, cell: Cell) -> Iterator[dict[str, Any]]:
    record, config = cell.record, cell.record["config"]
    head = {
        "model": config["model"],
        "task": config["task"],
        "method": cell.variant,
        "budget": cell.budget,
        "status": record["status"],
    }
    tail = {
        **_numbers(cell),
        "error": "" if cell.ok else cell.reason,
        "task_version": config["task_version"],
        "limit": "all" if config["limit"] is None else config["limit"],
        "kinds": " ".join(config.get("kinds") or ()),
        "seed": config["seed"],
        "positions": config["positions"] or "",
        "dtype": config["dtype"],
        "attn_implementation": config["attn_implementation"],
        "fingerprint": config["fingerprint"],
        "batch_size": record["batch_size"],
        "finished": record["finished"],
        "id": record["id"],
        "hardware": json.dumps(record["hardware"], sort_keys=True),
        "versions": json.dumps(record["versions"], sort_keys=True),
        "methods": json.dumps(config["methods"], sort_keys=True),
        "command": command_of(cell.record),
    }
    if not cell.ok:
        yield head | tail
        return
    for metric, score in record["scores"].items():
        found = section.against_dense(cell, metric) or (None, None, None)
        yield (
            head
            | {
                "metric": metric,
                "unit": score["unit"],
                "value": score["value"],
                "low": score["low"],
                "high": score["high"],
                "n": score["n"],
                "higher_is_better": score["higher_is_better"],
                **dict(zip(("vs_dense", "vs_dense_low", "vs_dense_high"), found, strict=True)),
            }
            | tail
        )


def _numbers(cell: Cell) -> dict[str, Any]:
    if not cell.ok:
        return {}
    record = cell.record
    tokens = {k: v for k, v in record["tokens"].items() if k != "per_layer"}
    spreads: dict[str, Spread | None] = {k: record["times"].get(k) for k in _SPREADS}  # type: ignore[misc]
    share = spreads["share_of_dense"]
    share = spreads["share_of_dense"]
    return {
        **{f"tokens_{key}": value for key, value in tokens.items()},
        "tokens_per_layer": " ".join(f"{n:g}" for n in record["tokens"]["per_layer"]),
        **{f"flops_{key}": value for key, value in record["flops"].items()},
        **{f"seconds_{key}": s["median"] if s else None for key, s in _without_share(spreads)},
        "first_token_share_of_dense": share["median"] if share else None,
        "kv_bytes": record["kv_bytes"],
        "peak_memory_bytes": record["peak_memory_bytes"],
        "rotary_positions": record["positions"] or "",
        "notes": "; ".join(record["notes"]),
    }


def _without_share(spreads: dict[str, Spread | None]) -> Iterator[tuple[str, Spread | None]]:
    return ((key, value) for key, value in spreads.items() if key != "share_of_dense")

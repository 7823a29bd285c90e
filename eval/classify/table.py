"""Records of a classifier as a table: a line a cell, the dense model first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..environment import describe
from ..results.records import budget_text
from ..results.statistics import difference
from ..results.texts import with_interval
from ..table import Table
from ..words.said import changed_fields

_HEADERS = (
    *("Method", "Budget", "Top-1 %", "vs dense", "Tokens", "Images/s", "GFLOPs", "Peak MiB"),
)
_NOTES = (
    "Top-1 with its 95 % interval; difference to dense in points, paired picture by picture. "
    "Tokens: patches or groups behind the last block, a mean. Images/s: forward passes alone. "
    "GFLOPs a picture: torch's counter on the first batch, multiply-add = 2. Peak: memory of the "
    "accelerator, with weights; a CPU tells none."
)


def classify_table(records: Sequence[Mapping[str, Any]], named: bool) -> Table:
    """
    Args:
        records: of one run's cells, dense first.
        named: whether folders are classes by their names.
    """
    dense = records[0] if records[0]["status"] == "ok" else None
    config = records[0]["config"]
    order = "by their names" if named else "in alphabetical order"
    return Table(
        headers=_HEADERS,
        rows=[_row(record, dense) for record in records],
        title=f"model: {config['model']} ({config['dtype']}), {config['pictures']} pictures, "
        f"folders are classes {order}, batch size: {config['batch_size']}, seed: "
        f"{config['seed']}, on {describe(records[-1]['hardware'])}",
        notes=_NOTES,
        droppable=(7, 4),
    )


def _row(record: Mapping[str, Any], dense: Mapping[str, Any] | None) -> tuple[str, ...]:
    head = (_name(record["config"]), budget_text(record))
    if record["status"] != "ok":
        return (*head, f"failed: {record['error']['type']}", *[""] * (len(_HEADERS) - 3))
    kept, peak = record["tokens_kept"], record["peak_memory_bytes"]
    return (
        *head,
        with_interval(record["top1"]),
        _difference(record, dense),
        "" if kept is None else f"{kept:.4g}",
        f"{record['images_per_second']:.4g}",
        f"{record['gflops']:.4g}",
        "" if peak is None else f"{peak / 2**20:.0f}",
    )


def _name(config: Mapping[str, Any]) -> str:
    names = []
    for method in config["methods"]:
        changed = changed_fields(method["name"], method["fields"], config["seed"])
        names.append(f"{method['name']}({', '.join(changed)})" if changed else method["name"])
    return "+".join(names) or "dense"


def _difference(record: Mapping[str, Any], dense: Mapping[str, Any] | None) -> str:
    if dense is None or not record["config"]["methods"]:
        return ""
    value, low, high = difference(record["top1"], dense["top1"])
    if low is None or high is None:
        return f"{100 * value:+.1f}"
    return f"{100 * value:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"

"""A record as one flat row, by the names that CSV files and data frames share."""

from __future__ import annotations

import json
from typing import Any

from ..environment import describe
from .agreement import agreement
from .records import Record, budget_text, method_name, variant
from .statistics import Score, difference


def head(record: Record) -> dict[str, Any]:
    """What was run: `method` has its changed fields with it, as in tables."""
    config = record["config"]
    return {
        "model": config["model"],
        "task": config["task"],
        "method": variant(record),
        "budget": budget_text(record),
        "status": record["status"],
    }


def score(record: Record, metric: str, dense: Record | None) -> dict[str, Any]:
    """A metric of a finished cell with its interval, and what it is above dense, paired."""
    here: Score = record["scores"][metric]
    pruned = bool(record["config"]["methods"])
    beside = dense["scores"].get(metric) if pruned and dense is not None else None
    found = difference(here, beside) if beside else (None, None, None)
    agrees = agreement(record, dense, metric) if pruned and dense is not None else None
    return {
        "metric": metric,
        "unit": here["unit"],
        "value": here["value"],
        "low": here["low"],
        "high": here["high"],
        "n": here["n"],
        "higher_is_better": here["higher_is_better"],
        **dict(zip(("vs_dense", "vs_dense_low", "vs_dense_high"), found, strict=True)),
        "same_answers": agrees.same_answers if agrees else None,
        "turned_wrong": agrees.turned_wrong if agrees else None,
        "turned_right": agrees.turned_right if agrees else None,
    }


def tail(record: Record) -> dict[str, Any]:
    """How it was run."""
    config = record["config"]
    error = record.get("error")
    return {
        "error": f"{error['type']}: {error['message']}" if error else "",
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
    }


def parts(record: Record) -> dict[str, Any]:
    """The method taken apart: names, all fields, and the budget where there is one."""
    methods = record["config"]["methods"]
    several = len(methods) > 1
    budgets = {json.dumps(entry["budget"]): entry["budget"] for entry in methods}
    (budget,) = budgets.values() if len(budgets) == 1 else (None,)
    return {
        "name": method_name(record),
        "fields": {
            f"{entry['name']}.{key}" if several else key: value
            for entry in methods
            for key, value in entry["fields"].items()
        },
        "budget_word": budget["word"] if budget else None,
        "budget_value": budget["value"] if budget else None,
        "code": "+".join(
            str(entry.get("source") or f"version {entry.get('version', 1)}") for entry in methods
        ),
    }


def machine(record: Record) -> dict[str, Any]:
    """Where, and with which versions."""
    return {
        "device": record["hardware"]["device"],
        "hardware": describe(record["hardware"]),
        **{f"version_{name}": version for name, version in record["versions"].items()},
    }

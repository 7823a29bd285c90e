"""How numbers of records are written: scores in percent or points, times, what was run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .records import main_score
from .statistics import Score, Spread


def scale(score: Score) -> int:
    """What a value is multiplied with to be shown: shares are in percent."""
    return 100 if score["unit"] == "share" else 1


def in_unit(score: Score) -> str:
    """The value, in percent or points."""
    return f"{scale(score) * score['value']:.1f}"


def with_interval(score: Score) -> str:
    """The value and its 95 % interval, in percent or points."""
    if score["low"] is None or score["high"] is None:
        return in_unit(score)
    by = scale(score)
    return f"{in_unit(score)} [{by * score['low']:.1f}, {by * score['high']:.1f}]"


def metric_text(record: Mapping[str, Any]) -> str:
    """The name of the main metric as a heading."""
    return metric_label(*main_score(record))


def metric_label(name: str, score: Score) -> str:
    """A metric as a heading, with its unit, and which way is better where that is not up."""
    words = f"{name[:1].upper()}{name[1:]}".replace("_", " ")
    down = "" if score["higher_is_better"] else " (lower is better)"
    return words + (" %" if score["unit"] == "share" else "") + down


def milliseconds(spread: Spread | None) -> str:
    return f"{1e3 * spread['median']:.1f}" if spread else ""


def setting_line(config: Mapping[str, Any]) -> str:
    """What was run, in one line."""
    limit = config["limit"] if config["limit"] is not None else "all"
    kinds = f"kinds: {' '.join(config['kinds'])}, " if config.get("kinds") else ""
    return (
        f"model: {config['model']} ({config['dtype']}, {config['attn_implementation']}), "
        f"task: {config['task']} v{config['task_version']}, {kinds}limit: {limit}, "
        f"seed: {config['seed']}"
    )

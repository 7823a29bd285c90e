"""The literature's one number for several benchmarks: the mean percentage of the dense model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..presets import reported_metrics
from .records import Config, Record, budget_text, main_score, variant

_OF_A_TASK = ("methods", "positions", "task", "task_version", "max_new_tokens")


@dataclass(frozen=True)
class PercentOfDense:
    """A method under a budget, over all tasks that it was run on.

    Attributes:
        by_task: score / dense score, in per cent; None where the dense model was not run on the
            task, or has nothing to divide by.
        average: the mean over tasks; None if any of them is None.
    """

    variant: str
    budget: str
    by_task: Mapping[str, float | None]

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks that enter the average."""
        return tuple(self.by_task)

    @property
    def average(self) -> float | None:
        shares = list(self.by_task.values())
        known = [share for share in shares if share is not None]
        return math.fsum(known) / len(shares) if shares and len(known) == len(shares) else None


def percent_of_dense(
    records: Sequence[Record], metrics: Mapping[str, str] | None = None
) -> list[PercentOfDense]:
    """For every method and budget, in the order of the records; the dense model is not among them.

    A cell is compared with the dense cell of the same model, task and settings (questions, seed,
    dtype, ...). Cells of one method that differ in settings other than the task are apart. Where
    lower is better, dense / score is taken, so that below 100 is always worse.

    Args:
        metrics: by task, the metric to take; `a+b` is the sum of two. Without, the metric that
            papers report for the task. Where there is none of either, the task's main metric.
    """
    chosen = reported_metrics() if metrics is None else metrics
    finished = [record for record in records if record["status"] == "ok"]
    dense = {
        Config(**record["config"]).setting: record
        for record in finished
        if not record["config"]["methods"]
    }
    groups: dict[tuple[object, ...], dict[str, float | None]] = {}
    for record in finished:
        if record["config"]["methods"]:
            key = (variant(record), budget_text(record), *_settings(record))
            baseline = dense.get(Config(**record["config"]).setting)
            task = record["config"]["task"]
            groups.setdefault(key, {})[task] = _percent(record, baseline, chosen.get(task))
    return [
        PercentOfDense(variant=str(key[0]), budget=str(key[1]), by_task=by_task)
        for key, by_task in groups.items()
    ]


def _settings(record: Record) -> tuple[tuple[str, str], ...]:
    """What cells of several tasks share."""
    shared = {k: v for k, v in record["config"].items() if k not in _OF_A_TASK}
    return tuple(sorted((key, str(value)) for key, value in shared.items()))


def _percent(record: Record, dense: Record | None, metric: str | None) -> float | None:
    if dense is None:
        return None
    parts = (metric or "").split("+")
    if not all(part in each["scores"] for part in parts for each in (record, dense)):
        parts = [main_score(record)[0]]
    if parts[0] not in dense["scores"]:
        return None
    measured, baseline = (_sum(each, parts) for each in (record, dense))
    if not record["scores"][parts[0]]["higher_is_better"]:
        measured, baseline = baseline, measured
    return 100 * measured / baseline if baseline else None


def _sum(record: Record, metrics: Sequence[str]) -> float:
    return math.fsum(record["scores"][metric]["value"] for metric in metrics)

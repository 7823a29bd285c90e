"""The statistics that tables need: scores and paired differences with intervals, quartiles."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, TypedDict, TypeVar

_Z = 1.959963984540054  # 95 %, two-sided
RESAMPLES = 200

Unit = Literal["share", "points"]
Item = TypeVar("Item")


class Spread(TypedDict):
    """Median and quartiles of repeated measurements."""

    median: float
    q1: float
    q3: float
    n: int


class Score(TypedDict):
    """A metric of one cell, with its 95 % interval where there is one.

    `value` is a share (0 to 1) or in the task's own points. `outcomes` are those of the questions,
    in their order, where the value is their mean; `replicates` are its values on bootstrap
    resamples, the same resamples for all cells of a task, where it is not.
    """

    value: float
    unit: Unit
    n: int
    low: float | None
    high: float | None
    higher_is_better: bool
    by_kind: dict[str, dict[str, float]]
    outcomes: list[float]
    replicates: list[float]


def mean_score(
    outcomes: Sequence[float],
    *,
    unit: Unit = "share",
    higher_is_better: bool = True,
    by_kind: Mapping[str, Mapping[str, float]] | None = None,
) -> Score:
    """The mean of what the questions gave: Wilson's interval for right and wrong, else the normal
    one."""
    value, n = statistics.fmean(outcomes), len(outcomes)
    low: float | None
    high: float | None
    if _binary(outcomes) and unit == "share":
        low, high = wilson(round(sum(outcomes)), n)
    else:
        low, high = _around(value, outcomes)
    return Score(
        value=value,
        unit=unit,
        n=n,
        low=low,
        high=high,
        higher_is_better=higher_is_better,
        by_kind={kind: dict(part) for kind, part in (by_kind or {}).items()},
        outcomes=list(outcomes),
        replicates=[],
    )


def aggregate_score(
    value: float,
    n: int,
    *,
    unit: Unit,
    higher_is_better: bool = True,
    replicates: Sequence[float] = (),
) -> Score:
    """A metric that is no mean over questions, with the interval that resamples give, if any."""
    low, high = _middle(replicates) if replicates else (None, None)
    return Score(
        value=value,
        unit=unit,
        n=n,
        low=low,
        high=high,
        higher_is_better=higher_is_better,
        by_kind={},
        outcomes=[],
        replicates=list(replicates),
    )


def resampled(items: Sequence[Item], aggregate: Callable[[list[Item]], float]) -> list[float]:
    """`aggregate` on `RESAMPLES` bootstrap resamples, drawn alike for equal numbers of items."""
    n = len(items)
    draw = random.Random(n)
    return [
        float(aggregate([items[i] for i in draw.choices(range(n), k=n)])) for _ in range(RESAMPLES)
    ]


def difference(score: Score, baseline: Score) -> tuple[float, float | None, float | None]:
    """What a score is above another one on the same questions, and its 95 % interval, paired
    question by question (or resample by resample); None where neither is known."""
    value = score["value"] - baseline["value"]
    a, b = score["outcomes"], baseline["outcomes"]
    if a and len(a) == len(b):
        if _binary(a) and _binary(b) and score["unit"] == "share":
            return paired_difference(a, b)
        changes = [x - y for x, y in zip(a, b, strict=True)]
        return value, *_around(value, changes)
    c, d = score["replicates"], baseline["replicates"]
    if c and len(c) == len(d) and score["n"] == baseline["n"]:
        low, high = _middle([x - y for x, y in zip(c, d, strict=True)])
        return value, low, high
    return value, None, None


def confidence_above(score: Score, baseline: Score, least: float) -> float:
    """How sure it is that a score is at least `least` above another one, question by question, by
    the normal distribution around their paired difference; 0.5 where it is just that.

    Where neither questions nor resamples are known it is 1 or 0, by the values alone. Where lower
    is better, above means below.
    """
    sign = 1 if score["higher_is_better"] else -1
    value, low, high = difference(score, baseline)
    if low is None or high is None or low == high:
        return float(sign * value >= least)
    half = (high - low) / 2
    return 0.5 * (1 + math.erf((sign * value - least) * _Z / half / math.sqrt(2)))


def _binary(outcomes: Sequence[float]) -> bool:
    return all(outcome in (0, 1) for outcome in outcomes)


def _around(mean: float, values: Sequence[float]) -> tuple[float, float] | tuple[None, None]:
    """The normal 95 % interval of a mean; none for a single value."""
    if len(values) < 2:
        return None, None
    half = _Z * statistics.stdev(values) / math.sqrt(len(values))
    return mean - half, mean + half


def _middle(values: Sequence[float]) -> tuple[float, float]:
    """What holds 95 % of the values."""
    cuts = statistics.quantiles(values, n=40, method="inclusive")
    return cuts[0], cuts[-1]


def wilson(correct: int, n: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson's score interval); (0, 1) without observations."""
    if not n:
        return 0.0, 1.0
    share = correct / n
    centre = share + _Z**2 / (2 * n)
    half = _Z * math.sqrt(share * (1 - share) / n + _Z**2 / (4 * n * n))
    scale = 1 + _Z**2 / n
    # Rounding must not put the share itself outside.
    return max(0.0, min(share, (centre - half) / scale)), max(share, (centre + half) / scale)


def paired_difference(
    outcomes: Sequence[float], baseline: Sequence[float]
) -> tuple[float, float, float]:
    """Difference of two shares on the same questions, with its 95 % interval (Bonett and Price).

    Args:
        outcomes, baseline: one number a question, 1 for right and 0 for wrong.
    """
    if len(outcomes) != len(baseline):
        raise ValueError(f"{len(outcomes)} outcomes cannot be paired with {len(baseline)}.")
    n = len(outcomes)
    gained = sum(a > b for a, b in zip(outcomes, baseline, strict=True))
    lost = sum(a < b for a, b in zip(outcomes, baseline, strict=True))
    p, q = (gained + 1) / (n + 2), (lost + 1) / (n + 2)
    half = _Z * math.sqrt((p + q - (p - q) ** 2) / (n + 2))
    return (gained - lost) / n if n else 0.0, max(-1.0, p - q - half), min(1.0, p - q + half)


def spread(values: Sequence[float]) -> Spread | None:
    """Median and quartiles; None without values."""
    if not values:
        return None
    if len(values) == 1:
        return Spread(median=values[0], q1=values[0], q3=values[0], n=1)
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(median=median, q1=q1, q3=q3, n=len(values))

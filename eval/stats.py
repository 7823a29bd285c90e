"""The statistics that tables need: intervals for a share and a paired difference, quartiles."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import TypedDict

_Z = 1.959963984540054  # 95 %, two-sided


class Spread(TypedDict):
    """Median and quartiles of repeated measurements."""

    median: float
    q1: float
    q3: float
    n: int


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


def paired_difference(outcomes: str, baseline: str) -> tuple[float, float, float]:
    """Difference of two shares on the same questions, with its 95 % interval (Bonett and Price).

    Args:
        outcomes, baseline: one character a question, "1" for right and "0" for wrong.
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

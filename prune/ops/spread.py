"""Whole numbers shared by sizes, and spread evenly over a line or a rectangle."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise


def share(total: int, sizes: Sequence[int]) -> list[int]:
    """`total` in whole numbers proportional to `sizes`, none above its size.

    What is left by rounding down goes to the largest remainders, the first of equal ones.
    """
    quotas = [total * size / sum(sizes) for size in sizes]
    counts = [int(quota) for quota in quotas]
    by_remainder = sorted(range(len(sizes)), key=lambda i: (counts[i] - quotas[i], i))
    for i in by_remainder[: total - sum(counts)]:
        counts[i] += 1
    return counts


def even_shares(total: int, parts: int) -> list[int]:
    """`total` as `parts` whole numbers that differ by at most 1, evenly mixed."""
    edges = [(2 * i * total + parts) // (2 * parts) for i in range(parts + 1)]
    return [high - low for low, high in pairwise(edges)]


def lattice_rows(count: int, rows: int, columns: int) -> int:
    """In how many rows `count` points lie as far apart in height as in width on rows x columns."""
    used = round(math.sqrt(count * rows / columns))
    return min(max(used, math.ceil(count / columns), 1), rows, count)

"""Whole numbers spread evenly over a line or a rectangle."""

from __future__ import annotations

import math
from itertools import pairwise


def even_shares(total: int, parts: int) -> list[int]:
    """`total` as `parts` whole numbers that differ by at most 1, evenly mixed."""
    edges = [(2 * i * total + parts) // (2 * parts) for i in range(parts + 1)]
    return [high - low for low, high in pairwise(edges)]


def lattice_rows(count: int, rows: int, columns: int) -> int:
    """In how many rows `count` points lie as far apart in height as in width on rows x columns."""
    used = round(math.sqrt(count * rows / columns))
    return min(max(used, math.ceil(count / columns), 1), rows, count)

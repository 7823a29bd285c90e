"""Averages over the tasks of a model."""

from __future__ import annotations

from collections.abc import Sequence

from .cells import Section
from .tables import Grid


def averages_table(sections: Sequence[Section]) -> list[tuple[str, Grid]]:
    """For every model that was asked several tasks: percent of dense, averaged over them."""
    return []

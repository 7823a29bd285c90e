"""The tables behind the main one of a report, in their order: the same in all formats."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

from .agreement import agreement_table
from .baselines import BESIDE, HARD, beside_baselines, hard_table
from .cells import Cell, Section
from .depths import NOTE as DEPTHS
from .depths import depths_table
from .grids import Grid, kinds_table, metrics_table
from .positions import NOTE as POSITIONS
from .positions import positions_table
from .published import beside_published
from .turns import NOTE as TURNS
from .turns import turns_table
from .where import NOTE as WHERE
from .where import maps, where_table


@dataclass(frozen=True)
class Further:
    """One of them.

    Attributes:
        note: what its columns say.
        shown: at once, where tables can be folded.
        maps: draws cells' pictures for pages, as `data:` URIs.
    """

    title: str
    grid: Grid
    note: str = ""
    shown: bool = True
    maps: Callable[[], Iterable[tuple[Cell, str]]] = tuple


def further_tables(section: Section, *, with_hard: bool) -> Iterator[Further]:
    """Those that there are; `with_hard`: also of the questions that `downsample` fails."""
    drawn = partial(maps, section)
    for title, grid, note, others in (
        ("Published beside measured", beside_published(section), "", {}),
        ("All metrics", metrics_table(section), "", {}),
        ("Second turn", turns_table(section), TURNS, {}),
        ("Beside baselines", beside_baselines(section), BESIDE, {}),
        ("By depth of the cut", depths_table(section), DEPTHS, {}),
        ("By positions", positions_table(section), POSITIONS, {}),
        ("Hard questions", hard_table(section) if with_hard else None, HARD, {}),
        ("Agreement with the dense model", agreement_table(section), "", {}),
        ("Where tokens are kept", where_table(section), WHERE, {"maps": drawn}),
        ("By kind of question", kinds_table(section), "", {"shown": False}),
    ):
        if grid is not None:
            yield Further(title, grid, note, **others)

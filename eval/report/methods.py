"""What the methods of a report do, a sentence each, and how pictures of kept tokens are read."""

from __future__ import annotations

from collections.abc import Sequence

from ...prune.errors import VlmpruneError
from ..method_facts import what_it_does
from ..words.downsample import class_of
from .cells import Section

UNKNOWN = "not known to the vlmprune that wrote this report"


def described(sections: Sequence[Section]) -> list[tuple[str, str]]:
    """Every method by its name, in the order of the report, and what it does."""
    names = dict.fromkeys(
        entry["name"]
        for section in sections
        for cell in section.cells
        for entry in cell.record["config"]["methods"]
    )
    return [(str(name), _sentence(name)) for name in names]


def _sentence(name: str) -> str:
    try:
        said = what_it_does(class_of(name))
    except (VlmpruneError, TypeError):
        return UNKNOWN
    return f"{said[:1].upper()}{said[1:].rstrip('.')}."

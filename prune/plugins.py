"""What other packages add: the entry points of a group, each name given to one of them."""

from __future__ import annotations

from collections.abc import Container, Iterable
from dataclasses import dataclass
from importlib.metadata import EntryPoint

ENTRY_POINT_GROUP = "vlmprune.methods"


@dataclass(frozen=True)
class Plugins:
    """Who has a name: this package, else the one that comes first in the alphabet."""

    points: dict[str, EntryPoint]
    """Name -> the entry point that has it; not yet loaded."""
    notes: tuple[str, ...]
    """Of names that were taken already: whose thing is not used, and whose is."""

    @classmethod
    def of(
        cls, points: Iterable[EntryPoint], shipped: Container[str], *, what: str = "method"
    ) -> Plugins:
        """Sort out who has which name; nothing is imported.

        Args:
            what: the points are names of, for the notes.
        """
        used: dict[str, EntryPoint] = {}
        notes = []
        for point in sorted(points, key=lambda point: (point.name, owner_of(point), point.value)):
            first = used.setdefault(point.name, point) if point.name not in shipped else None
            if first is not None and first.value == point.value:  # new, or installed twice
                continue
            winner = f"vlmprune has a {what}" if first is None else f"{owner_of(first)} has one"
            notes.append(
                f"The {what} {point.name!r} of the package {owner_of(point)} ({point.value}) is "
                f"not used: {winner} of this name. It needs another name in its entry points."
            )
        return cls(used, tuple(notes))


def owner_of(point: EntryPoint) -> str:
    """The distribution that an entry point comes from, or else its module."""
    return point.dist.name if point.dist is not None else point.module

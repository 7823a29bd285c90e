"""What other packages add: the entry points of a group, each name given to one of them; and the
classes that entry points and our own files hold."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Container, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from types import ModuleType
from typing import TypeVar

from .errors import PluginError

ENTRY_POINT_GROUP = "vlmprune.methods"
T = TypeVar("T")


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
        """Sort out who has which name; nothing is imported. Of names that are taken a warning is
        logged.

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
        for note in notes:
            logging.getLogger("vlmprune").warning(note)
        return cls(used, tuple(notes))


def owner_of(point: EntryPoint) -> str:
    """The distribution that an entry point comes from, or else its module."""
    return point.dist.name if point.dist is not None else point.module


@contextmanager
def blamed(point: EntryPoint, *, what: str) -> Iterator[None]:
    """Whatever is raised inside, where an entry point is loaded, is its package's fault.

    Raises:
        PluginError: saying whose.
    """
    try:
        yield
    except (Exception, SystemExit) as error:
        owner = owner_of(point)
        raise PluginError(
            f"The {what} {point.name!r} comes from another package, {owner}, and cannot be loaded: "
            f"{point.value} raised {type(error).__name__}: {error}. Repair that package, or take "
            f"it away: pip uninstall {owner}."
        ) from error


def class_of(found: object, base: type[T]) -> type[T]:
    """What an entry point gave, if it is a class derived from `base` that defines all of it.

    Raises:
        TypeError: it is not.
    """
    if not inspect.isclass(found) or not issubclass(found, base):
        name = base.__name__
        raise TypeError(f"{found!r} is no {name}: derive a class from {base.__module__}.{name}")
    if missing := sorted(getattr(found, "__abstractmethods__", ())):
        raise TypeError(f"{found.__qualname__} does not define {', '.join(missing)}")
    return found


def class_in(module: ModuleType, base: type[T]) -> type[T]:
    """The one class derived from `base` that a module defines."""
    (found,) = (
        value
        for value in vars(module).values()
        if inspect.isclass(value)
        and issubclass(value, base)
        and value.__module__ == module.__name__
    )
    return found

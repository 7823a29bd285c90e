"""How a property says that it does not hold, or has no meaning for a method."""

from __future__ import annotations


class NotApplicable(Exception):
    """The property has no meaning here; says why."""


class Broken(Exception):
    """The property does not hold; says what was seen."""

"""Numbers of the papers beside measured ones."""

from __future__ import annotations

from .cells import Section
from .tables import Grid


def beside_published(section: Section) -> Grid | None:
    """Measured and published, for the cells that a paper has; None without any."""
    return None

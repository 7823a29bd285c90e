"""The table of presets."""

from __future__ import annotations

from ..table import Table
from . import preset, preset_names, sources


def presets_table() -> Table:
    """Name, what it is, its model, budgets and tasks, and how many numbers of whom it holds."""
    rows: list[tuple[str, ...]] = []
    for name in preset_names():
        found = preset(name)
        lineages = dict.fromkeys(entry.lineage for entry in found.published)
        rows.append(
            (
                name,
                found.about,
                found.model,
                ", ".join(found.budgets),
                ", ".join(found.tasks),
                f"{len(found.published)} of {', '.join(lineages)}",
            )
        )
    every = [entry for name in preset_names() for entry in preset(name).published]
    return Table(
        headers=("Preset", "What", "Model", "Budgets", "Tasks", "Published numbers"),
        rows=rows,
        numbers_from=6,
        notes="Sources. " + "; ".join(sources(every)) + ".",
        wrapping=(1, 3, 4, 5),
        droppable=(4, 2),
    )

"""Numbers of the papers beside measured ones."""

from __future__ import annotations

from ..presets.published import on_scale, published_for
from .cells import Section
from .grids import Entry, Grid, Row


def beside_published(section: Section) -> Grid | None:
    """Measured and published, for the cells that a paper has; None without any."""
    rows = []
    for cell in section.done:
        for entry in published_for(cell.record):
            measured = on_scale(cell.record, entry)
            limit = cell.record["config"]["limit"]
            only = f"measured on {limit} {section.kind.item}s only" if limit is not None else ""
            note = "; ".join(part for part in (only, entry.note, entry.benchmark.note) if part)
            rows.append(
                Row(
                    [
                        Entry(cell.variant, cell.variant),
                        Entry(cell.budget, cell.budget),
                        Entry(entry.benchmark.name, entry.benchmark.name),
                        Entry("" if measured is None else f"{measured:.1f}", measured),
                        Entry(f"{entry.value:g}", entry.value),
                        Entry(
                            "" if measured is None else f"{measured - entry.value:+.1f}",
                            None if measured is None else measured - entry.value,
                        ),
                        Entry(
                            f"{entry.source} ({entry.lineage})" if entry.lineage else entry.source
                        ),
                        Entry(note),
                    ],
                    cell,
                )
            )
    if not rows:
        return None
    headers = ["Method", "Budget", "Benchmark", "Measured", "Published", "Difference"]
    return Grid([*headers, "Source", "Note"], rows, numbers_from=3, numbers_to=len(headers))

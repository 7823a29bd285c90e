"""Numbers of the papers beside measured ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..presets import Published
from ..presets.published import published_for
from ..results.task_kinds import kind_of
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


def on_scale(record: Mapping[str, Any], entry: Published) -> float | None:
    """What the record has measured, on the scale of the published number; None if it has not."""
    if name := entry.benchmark.number:
        value = kind_of(record["config"]).numbers(record).get(name)
        return None if value is None else float(value / entry.benchmark.per)
    total = 0.0
    for metric in entry.metric.split("+"):
        score = record.get("scores", {}).get(metric)
        if score is None:
            return None
        total += score["value"] * (entry.benchmark.full if score["unit"] == "share" else 1)
    return total

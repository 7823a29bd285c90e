"""What is said of a grid that was run: its tables and frontiers, and lines at the end."""

from __future__ import annotations

import sys
from collections.abc import Collection, Sequence
from io import BytesIO
from pathlib import Path

from ..console import stdout
from ..extras import Extras
from ..results.plot import frontier
from ..results.records import Record, latest, setting_of
from ..results.sweep_table import averages_table, sweep_table
from ..words.flags import in_flags
from .grid import Summary


def show(folder: Path, records: Sequence[Record], settings: Collection[object]) -> None:
    """Tables to stdout and `table.md`, frontiers to PNG: all that the records have of these
    settings."""
    console, extras = stdout(), Extras()
    shown = [r for r in latest(records) if setting_of(r) in settings]
    task_of = {setting_of(record): record["config"]["task"] for record in shown}
    texts = []
    for setting, task in task_of.items():
        of_task = [r for r in shown if setting_of(r) == setting]
        table = sweep_table(of_task)
        table.print(console)
        texts.append(table.markdown())
        name = "frontier.png" if len(task_of) == 1 else f"frontier_{task}.png"
        frontier(of_task, png := BytesIO())
        extras.write("pictures", folder / name, png.getvalue())
    if len(task_of) > 1:
        table = averages_table(shown)
        table.print(console)
        texts.append(table.markdown())
    extras.write("tables", folder / "table.md", ("\n\n".join(texts) + "\n").encode())


def say_interrupted(folder: Path, *, rerun: bool) -> None:
    """Where finished cells are, and how to go on."""
    same = "the same command" + " without --rerun" * rerun
    sys.stderr.write(f"interrupted: finished cells are in {folder}, {same} goes on there\n")


def say_what_happened(summary: Summary, folder: Path) -> None:
    """Cells that have no numbers with their reasons, what was skipped, and all counted."""
    counts = {
        "run": len(summary.ok),
        "already there": len(summary.skipped),
        "not applicable": len(summary.not_applicable),
        "failed": len(summary.failed),
    }
    for what, cells in (("not applicable", summary.not_applicable), ("failed", summary.failed)):
        for cell, reason in cells:
            sys.stderr.write(f"{what}: {cell}: {in_flags(' '.join(reason.split()))}\n")
    for line in summary.skipped_lines():
        sys.stderr.write(f"{line} (again: --rerun)\n")
    said = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
    sys.stderr.write(f"cells: {said or 'none'}; results in {folder}\n")

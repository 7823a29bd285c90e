"""A report as Markdown: what is pasted into an issue, or read in a terminal."""

from __future__ import annotations

import json
from collections.abc import Sequence

from ..table import Table
from .averages import averages_table
from .cells import Cell, Section
from .escape import fenced, markdown, one_line
from .examples import Asked, asked
from .further import further_tables
from .grids import Grid, facts, main_table
from .methods import described
from .repeat import command_of, needs

BEST = "★"
NOTES = (
    f"{BEST}: no other cell is both as good and as cheap (FLOPs share). Brackets: 95 % intervals; "
    "`vs dense` is paired {item} by {item}. "
)


def render(sections: Sequence[Section], most: int | None = None, *, with_hard: bool = False) -> str:
    """All sections, one after the other.

    Args:
        most: questions of every task that are shown; None for all that were recorded.
        with_hard: also the questions that `downsample` fails.
    """
    parts = ["# vlmprune report"]
    for model, grid in averages_table(sections):
        parts += [f"## Average over tasks: {markdown(model)}", table(grid)]
    for section in sections:
        parts += _section(section, most, with_hard)
    if methods := described(sections):
        lines = [f"- {markdown(name)}: {markdown(sentence)}" for name, sentence in methods]
        parts += ["## What the methods do", "\n".join(lines)]
    return "\n\n".join(parts) + "\n"


def table(grid: Grid) -> str:
    """A grid as a Markdown table; its texts are escaped here."""
    rows = []
    for row in grid.rows:
        first, *others = (markdown(entry.text) for entry in row.entries)
        rows.append((f"{first} {BEST}" if row.best else first, *others))
    headers = tuple(markdown(header) for header in grid.headers)
    return Table(headers, rows, numbers_from=grid.numbers_from).markdown()


def _section(section: Section, most: int | None, with_hard: bool) -> list[str]:
    config = section.config
    parts = [
        f"## {markdown(config['task'])}: {markdown(config['model'])}",
        "\n".join(f"- {word}: {markdown(value)}" for word, value in facts(section)),
        table(main_table(section)),
        NOTES.format(item=section.kind.item) + section.kind.notes,
    ]
    for further in further_tables(section, with_hard=with_hard):
        parts += [f"### {further.title}", table(further.grid)]
        parts += [further.note] if further.note else []
    if section.missing:
        parts.append("### Not run")
        parts.append(
            "\n".join(
                f"- {markdown(cell.name)} ({cell.record['status'].replace('_', ' ')}): "
                f"{markdown(cell.reason)}"
                for cell in section.missing
            )
        )
    if examples := asked(section, most):
        parts += ["### Examples", *(_example(example) for example in examples)]
    parts += ["### Configurations", *_configurations(section)]
    return parts


def _example(example: Asked) -> str:
    head = f"**{markdown(example.question)}** Right answer: {markdown(example.answer)}"
    rows: list[tuple[str, ...]] = [
        (markdown(given.cell.name), markdown(given.prediction), given.verdict)
        for given in example.given
    ]
    return f"{head}\n\n{Table(('Method', 'Answer', ''), rows, numbers_from=3).markdown()}"


def _configurations(section: Section) -> list[str]:
    return [part for cell in section.cells for part in _configuration(cell)]


def _configuration(cell: Cell) -> list[str]:
    name = markdown(cell.name)
    if not cell.record["id"].isalnum():
        config = fenced(json.dumps(cell.record["config"]))
        return [f"{markdown(cell.record['id'])}: {name}", config]
    command = fenced(one_line(command_of(cell.record)))
    besides = "\n".join(f"- {markdown(need)}" for need in needs(cell.record))
    return [f"`{cell.record['id']}`: {name}", command, *([besides] if besides else [])]

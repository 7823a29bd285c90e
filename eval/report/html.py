"""A report as one HTML page that needs nothing else: no server, no network, no other file.

Everything is escaped by the template engine, and the page's own policy (CSP) allows nothing but its
own three scripts, by their hashes: text of a result file that got through as markup would not run.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from ..compare.side_by_side import LEGEND
from .averages import averages_table
from .cells import Cell, Section
from .chart import chart
from .examples import Asked, Given, asked
from .files import NoFileError
from .further import further_tables
from .grids import dense_text, facts, main_table
from .methods import described
from .pictures import data_uri
from .repeat import command_of, needs
from .where import MAPS

_RECORDED = ("id", "status", "finished", "seconds", "batch_size", "load_average", "notes")


@dataclass(frozen=True)
class Picture:
    """`source` is a data URI; where there is none, `reason` says why."""

    source: Markup | None = None
    width: int = 0
    height: int = 0
    reason: str = ""


def render(sections: Sequence[Section], most: int | None = None, *, with_hard: bool = False) -> str:
    """The page.

    Args:
        most: questions with pictures of every task; None for all that were recorded.
        with_hard: also the questions that `downsample` fails.
    """
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    environment.policies["json.dumps_kwargs"] = {"sort_keys": True, "allow_nan": False}
    anchors = _anchors(sections)
    plotly, script = _plotly(), _page_file("page.js")
    # In the order of the page; equal input makes an equal page.
    views = [
        _view(n, section, anchors, most, with_hard) for n, section in enumerate(sections, start=1)
    ]
    drawn = any(view["chart"] for view in views)
    template = environment.from_string(_page_file("page.html.j2"))
    return template.render(
        title=_title(sections),
        policy=_policy([script, plotly]),
        style=Markup(_page_file("page.css")),
        script=Markup(script),
        plotly=Markup(_packed(plotly)) if drawn else None,
        averages=averages_table(sections),
        methods=described(sections),
        legend=LEGEND,
        maps_note=MAPS,
        sections=views,
        cells=sum(len(section.cells) for section in sections),
        anchors=anchors,
    )


def _view(
    number: int,
    section: Section,
    anchors: dict[str, str],
    most: int | None,
    with_hard: bool,
) -> dict[str, Any]:
    config = section.config
    return {
        "anchor": f"task-{number}",
        "task": config["task"],
        "model": config["model"],
        "summary": _summary(section),
        "facts": facts(section),
        "machines": len(section.hardware),
        "earlier": section.earlier and f"{section.earlier[:1].upper()}{section.earlier[1:]}.",
        "chart": chart(section, anchors),
        "main": main_table(section),
        "item": section.kind.item,
        "measures": section.kind.notes,
        "more": list(further_tables(section, with_hard=with_hard)),
        "examples": [_example(example) for example in asked(section, most)],
        "missing": section.missing,
        "configurations": [_configuration(cell) for cell in section.cells],
    }


def _summary(section: Section) -> str:
    parts = [f"{len(section.done)} of {len(section.cells)} cells finished"]
    if (dense := dense_text(section)) is not None:
        parts.append(f"dense {section.main} {dense}")
    return ", ".join(parts)


def _example(example: Asked) -> dict[str, Any]:
    return {
        "question": example.question,
        "answer": example.answer,
        "given": [(given, _picture(given)) for given in example.given],
    }


def _picture(given: Given) -> Picture:
    if not given.picture:
        return Picture(reason="no picture was recorded")
    try:
        source, width, height = data_uri(given.cell.folder, given.picture)
    except NoFileError as reason:
        return Picture(reason=str(reason))
    return Picture(Markup(source), width, height)  # base64 of ours: nothing to escape


def _configuration(cell: Cell) -> dict[str, Any]:
    record = cell.record
    shown: dict[str, Any] = {"config": record["config"]}
    shown |= {key: record[key] for key in _RECORDED if key in record}  # type: ignore[literal-required]
    shown |= {"versions": record["versions"], "hardware": record["hardware"]}
    return {
        "cell": cell,
        "command": command_of(record),
        "needs": needs(record),
        "json": json.dumps(shown, indent=2, ensure_ascii=False),
        "traceback": (record.get("error") or {}).get("traceback"),
    }


def _anchors(sections: Sequence[Section]) -> dict[str, str]:
    """Names of our own: ids come from the file."""
    cells = [cell for section in sections for cell in section.cells]
    return {cell.record["id"]: f"cell-{number}" for number, cell in enumerate(cells, start=1)}


def _title(sections: Sequence[Section]) -> str:
    tasks = dict.fromkeys(str(section.config["task"]) for section in sections)
    models = dict.fromkeys(str(section.config["model"]) for section in sections)
    return f"{', '.join(models)} on {', '.join(tasks)}"


def _plotly() -> str:
    from plotly.offline import get_plotlyjs

    return get_plotlyjs()


def _packed(script: str) -> str:
    """A third of its size; the page's script unpacks it."""
    return base64.b64encode(gzip.compress(script.encode(), 9, mtime=0)).decode()


def _policy(scripts: Sequence[str]) -> str:
    """What the page may load: nothing; and run: these scripts."""
    hashes = " ".join(
        f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
        for script in scripts
    )
    return (
        f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; "
        "img-src data: blob:; base-uri 'none'; form-action 'none'"
    )


def _page_file(name: str) -> str:
    return (resources.files(__package__) / "page" / name).read_text(encoding="utf-8")

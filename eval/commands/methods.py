"""`vlmprune methods`: a table of all, read from the registry, or the page of one."""

from __future__ import annotations

from ...prune.budget import PUBLISHED
from ...prune.contract import Method
from ...prune.registry import default_methods, plugin_notes
from ..arguments.methods import MethodsRequest
from ..console import stdout
from ..method_facts import on_tiles, paper, reads, what_it_does
from ..table import Table
from .method_page import method_page

_PAGE_WIDTH = 100


def run(request: MethodsRequest) -> int:
    """The command. Returns the exit code."""
    console = stdout()
    if request.name:
        width = min(console.width, _PAGE_WIDTH) if console.is_terminal else _PAGE_WIDTH
        console.print(method_page(request.name, width), markup=False)
    else:
        methods_table().print(console)
    return 0


def methods_table() -> Table:
    """Name, what it does, where it acts, what it reads, what it does on tiles, whether it needs a
    budget or also runs as published, its positions and fields, its paper."""
    made, wrong = default_methods()
    rows = {name: _row(name, method) for name, method in made.items()}
    rows |= {name: (name, why, *[""] * 7) for name, why in wrong.items()}
    return Table(
        headers=(
            "Method",
            "Keeps",
            "Acts",
            "Reads",
            "On tiles",
            "Budget",
            "Positions",
            "Fields",
            "Paper",
        ),
        rows=[rows[name] for name in sorted(rows)],
        numbers_from=9,
        notes="\n".join(plugin_notes()) or None,
        wrapping=(1, 2, 3, 4, 7),
        droppable=(6, 8, 4, 7, 5),
    )


def _row(name: str, method: Method) -> tuple[str, ...]:
    cls = type(method)
    fields = ", ".join(
        key if value is None else f"{key}={value!r}"
        for key, value in method.fields().items()
        if key not in ("newlines", "scope")
    )
    return (
        name,
        what_it_does(cls),
        " and ".join(place.value for place in method.places),
        reads(method),
        on_tiles(cls),
        _budget(method),
        cls.positions,
        fields,
        paper(cls),
    )


def _budget(method: Method) -> str:
    """Whether one is needed, may be given, or is refused."""
    if method.unbudgeted:
        return f"{PUBLISHED} alone"
    return "needed" if method.wants_budget else f"or {PUBLISHED}"

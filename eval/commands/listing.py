"""Tables of what there is: methods and model families, read from the registries."""

from __future__ import annotations

import inspect

from ...adapters.registry import family_class, family_notes, model_names
from ...prune.budget import PUBLISHED
from ...prune.contract import Method
from ...prune.errors import PluginError
from ...prune.registry import default_methods, plugin_notes
from ..method_facts import first_line, on_tiles, paper, reads, what_it_does
from ..table import Table


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
        "needed" if cls.needs_budget else f"or {PUBLISHED}",
        cls.positions,
        fields,
        paper(cls),
    )


def models_table() -> Table:
    """Model type, what it is, and the position modes it allows."""
    rows: list[tuple[str, ...]] = []
    for name in model_names():
        try:
            found = family_class(name)
        except PluginError as error:
            rows.append((name, str(error), ""))
            continue
        what = first_line(inspect.getmodule(found).__doc__)
        rows.append((name, what, "original" if found.mrope else "original, repacked"))
    return Table(
        headers=("Model type", "What", "Positions"),
        rows=rows,
        numbers_from=3,
        notes="\n".join(family_notes()) or None,
        wrapping=(1,),
    )

"""`vlmprune models`: a table of the model families, read from their registry."""

from __future__ import annotations

import inspect

from ...adapters.registry import family_class, family_notes, model_names
from ...prune.errors import PluginError
from ..arguments.models import ModelsRequest
from ..console import stdout
from ..method_facts import first_line
from ..table import Table


def run(request: ModelsRequest) -> int:
    """The command. Returns the exit code."""
    models_table().print(stdout())
    return 0


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

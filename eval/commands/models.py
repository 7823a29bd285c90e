"""`vlmprune models`: a table of the model families, read from their registry."""

from __future__ import annotations

import inspect

from ...adapters.family import Family
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
    """Every family: what it is, and what of it can be pruned where."""
    rows: list[tuple[str, ...]] = []
    for name in model_names():
        try:
            found = family_class(name)
        except PluginError as error:
            rows.append((name, str(error), *[""] * (len(_HEADERS) - 2)))
            continue
        rows.append((name, first_line(inspect.getmodule(found).__doc__), *_facts(found)))
    return Table(
        headers=_HEADERS,
        rows=rows,
        numbers_from=len(_HEADERS),
        notes="\n".join(family_notes()) or None,
        wrapping=(1, len(_HEADERS) - 1),
    )


_HEADERS = (
    "Model type",
    "What",
    "Since transformers",
    "Prunes",
    "In the encoder",
    "Positions",
    "Refused",
)


def _facts(family: type[Family]) -> tuple[str, ...]:
    """All columns behind the first two."""
    variants = first_line(family.check.__doc__) if family.check is not Family.check else ""
    return (
        family.since,
        ", ".join(f"{modality.name}s" for modality in family.modalities),
        "no" if family.encoder is Family.encoder else "yes",
        "original" if family.mrope else "original, repacked",
        variants,
    )

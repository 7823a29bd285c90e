"""What is known of model families by name: a file `eval/models/families/<model_type>.py` holds one
`EvalFamily`; other packages add theirs in the entry-point group `vlmprune.eval_families`."""

from __future__ import annotations

import importlib
import logging
import pkgutil
import re
from functools import cache
from importlib.metadata import entry_points

from ...adapters.registry import model_names
from ...prune.errors import PluginError, UnsupportedModelError
from ...prune.plugins import Plugins, blamed, class_in, class_of
from . import families
from .family import EvalFamily

ENTRY_POINT_GROUP = "vlmprune.eval_families"
"""`model_type = "package.module:TheirEvalFamily"` in the `pyproject.toml` of another package."""


@cache
def _files() -> frozenset[str]:
    """Those of this package."""
    return frozenset(module.name for module in pkgutil.iter_modules(families.__path__))


@cache
def _plugins() -> Plugins:
    """Those of other packages; of names that are taken a warning is logged, once."""
    return Plugins.of(entry_points(group=ENTRY_POINT_GROUP), _files(), what="EvalFamily")


@cache
def known_families() -> tuple[str, ...]:
    """Their names (`model_type`), ours first, a later version behind an earlier one; those whose
    models the installed `transformers` has, and that can be patched."""
    here = {*_files(), *_plugins().points} & {*model_names()}
    return tuple(sorted(here, key=lambda name: (name not in _files(), _version(name))))


def _version(name: str) -> list[tuple[bool, int, str]]:
    """x2_y before x2_5_y."""
    parts = re.findall(r"\d+|[a-z]+", name)
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in parts]


@cache
def known_family(name: str) -> EvalFamily | None:
    """What is known of a family; None where nobody has said anything.

    Raises:
        PluginError: it is another package's, which cannot be imported.
    """
    if name not in known_families():
        return None
    if name in _files():
        return class_in(importlib.import_module(f"{families.__name__}.{name}"), EvalFamily)()
    point = _plugins().points[name]
    with blamed(point, what="EvalFamily"):
        return class_of(point.load(), EvalFamily)()


@cache
def all_families() -> tuple[EvalFamily, ...]:
    """What is known of each; for a family of another package that cannot be imported a warning is
    logged, as it is not the one that is asked for."""
    found = []
    for name in known_families():
        try:
            found.append(eval_family(name, "Nothing is known"))
        except PluginError as error:
            logging.getLogger("vlmprune").warning(str(error))
    return tuple(found)


def eval_family(name: str, wanted: str) -> EvalFamily:
    """What is known of a family.

    Args:
        wanted: what cannot be done without, for the error.

    Raises:
        UnsupportedModelError: nobody has said anything of it.
        PluginError: as `known_family`.
    """
    found = known_family(name)
    if found is None:
        raise UnsupportedModelError(
            f"{wanted} for {name!r}, only for {', '.join(known_families())}. To add it, derive a "
            f"class from EvalFamily in eval/models/families/{name}.py, or in your own package, "
            f"whose entry points name it in the group {ENTRY_POINT_GROUP}."
        )
    return found

"""What is known of model families by name: a file `eval/models/families/<model_type>.py` holds one
`EvalFamily`."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from functools import cache

from ...adapters.registry import model_names
from ...prune.errors import UnsupportedModelError
from . import families
from .family import EvalFamily


@cache
def known_families() -> tuple[str, ...]:
    """Their names (`model_type`), a later version behind an earlier one; those whose models the
    installed `transformers` has."""
    here = {m.name for m in pkgutil.iter_modules(families.__path__)} & {*model_names()}
    return tuple(sorted(here, key=_version))


def _version(name: str) -> list[tuple[bool, int, str]]:
    """x2_y before x2_5_y."""
    parts = re.findall(r"\d+|[a-z]+", name)
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in parts]


@cache
def known_family(name: str) -> EvalFamily | None:
    """What is known of a family; None where it has no file here."""
    if name not in known_families():
        return None
    module = importlib.import_module(f"{families.__name__}.{name}")
    (cls,) = (
        value
        for value in vars(module).values()
        if inspect.isclass(value)
        and issubclass(value, EvalFamily)
        and value.__module__ == module.__name__
    )
    found: type[EvalFamily] = cls
    return found()


def eval_family(name: str, wanted: str) -> EvalFamily:
    """What is known of a family.

    Args:
        wanted: what cannot be done without, for the error.

    Raises:
        UnsupportedModelError: the family has no file here.
    """
    found = known_family(name)
    if found is None:
        raise UnsupportedModelError(
            f"{wanted} for {name!r}, only for {', '.join(known_families())}. To add it, derive a "
            f"class from EvalFamily in eval/models/families/{name}.py."
        )
    return found

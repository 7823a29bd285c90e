"""What the tests know of each family beyond what the package says of it: `tests/families`.

A file there says how its model differs from the usual one, and the oracles ask here.
"""

from __future__ import annotations

import importlib
from typing import Any

from vlmprune.eval.models.registry import known_families

OF_TESTS = {name: importlib.import_module(f"families.{name}") for name in known_families()}


def fact(model: Any, name: str, default: Any = None) -> Any:
    """What the file of a model's family says under a name, if it does."""
    return getattr(OF_TESTS.get(model.config.model_type), name, default)

"""Methods and budgets as words again, with the fields that differ from their defaults."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...prune.amount import PREFIXES, PUBLISHED
from ...prune.errors import VlmpruneError
from .downsample import class_of
from .parts import Part


def parts_text(parts: Sequence[Part], seed: int = 0) -> str:
    """Methods with changed fields and budgets, e.g. `fastv(layer=3, keep_ratio=0.25)`, or dense."""
    return "+".join(_part_text(part, seed) for part in parts) or "dense"


def _part_text(part: Part, seed: int) -> str:
    name = part.method.name
    said = changed_fields(name, part.method.fields(), seed)
    said.append(str(part.budget) if part.budget else PUBLISHED)
    return f"{name}({', '.join(said)})"


def changed_fields(name: str, fields: Mapping[str, object], seed: int) -> list[str]:
    """`field=value` of every field that is not at its default (a `seed`: not the sweep's)."""
    try:
        usual = class_of(name)().fields() | {"seed": seed}
    except (VlmpruneError, TypeError):  # recorded by a version that knew this method
        return []
    return [
        f"{k}={_as_read(v)}"
        for k, v in fields.items()
        if k in usual and _as_read(v) != _as_read(usual[k])
    ]


def budget_word(budget: Mapping[str, Any] | None) -> str:
    """A recorded budget as the command line writes it, rounded to what is read at a glance."""
    return f"{PREFIXES.get(budget['word'], '')}{budget['value']:g}" if budget else PUBLISHED


def _as_read(value: object) -> object:
    """A field's value as it comes back from a file."""
    return list(value) if isinstance(value, tuple) else value

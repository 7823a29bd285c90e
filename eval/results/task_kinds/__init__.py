"""Kinds of tasks: what each measures beside its scores, and how tables, charts and files show it"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .. import records
from .answers import ANSWERS
from .classes import CLASSES
from .kind import Column, Cost, Finished, Mean, TaskKind

__all__ = ["ANSWERS", "CLASSES", "Column", "Cost", "Finished", "Mean", "TaskKind", "kind_of"]

_KINDS = {kind.name: kind for kind in (ANSWERS, CLASSES)}


def kind_of(config: Mapping[str, Any]) -> TaskKind:
    """The kind of task of a record's configuration.

    Raises:
        KeyError: there is none of this name.
    """
    return _KINDS[config.get("task_kind", records.ANSWERS)]

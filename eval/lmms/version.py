"""The version of a task of lmms-eval: its own number, and a hash of what it asks and how it scores.

The same on every machine: paths and addresses in memory are left out.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import os
from collections.abc import Mapping
from typing import Any

_ELSEWHERE = ("dataset_kwargs", "metadata", "task_alias", "description_file")


def version_of(task: Any, questions: int) -> str:
    """E.g. `0.0-3f1c2a9b`; `questions` are all that the task has."""
    config = {
        key: _plain(value)
        for key, value in vars(task.config).items()
        if key not in _ELSEWHERE and value is not None
    }
    config |= {"questions": questions, "prompts": _plain(task.lmms_eval_specific_kwargs)}
    text = json.dumps(config, sort_keys=True)
    return f"{_number(task.config.metadata)}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def _number(metadata: Any) -> object:
    """The version in a task's metadata, which is a mapping or a list of them."""
    entries = metadata if isinstance(metadata, list) else [metadata]
    for entry in entries:
        if isinstance(entry, Mapping) and "version" in entry:
            return entry["version"]
    return "0"


def _plain(value: Any) -> Any:
    """A value as JSON: functions as their source, paths as their last part."""
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    if isinstance(value, str):
        return os.path.basename(value.rstrip("/")) if os.path.isabs(value) else value
    if isinstance(value, (bool, int, float)) or value is None:
        return value
    if isinstance(value, functools.partial):
        return [_plain(value.func), _plain(value.args), _plain(value.keywords)]
    if callable(value):
        try:
            return inspect.getsource(value)
        except (OSError, TypeError):
            return getattr(value, "__qualname__", type(value).__qualname__)
    return type(value).__qualname__

"""The version of a task of lmms-eval: its own number, and a hash of what it asks and how it scores.

Of tasks that lmms-eval or this package ships, their configuration counts; of all others also every
question that is asked, with its pictures, and the files of their functions. The same on every
machine: paths and addresses in memory are left out.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from ..content_hash import content_hash

_ELSEWHERE = ("dataset_kwargs", "metadata", "task_alias", "description_file")


def version_of(task: Any, questions: int, *, asked: int = 0) -> str:
    """E.g. `0.0-3f1c2a9b`.

    Args:
        questions: all that the task has.
        asked: so many of them count by their contents, of a task that nobody ships.
    """
    config = {
        key: _plain(value)
        for key, value in vars(task.config).items()
        if key not in _ELSEWHERE and value is not None
    }
    config |= {"questions": questions, "prompts": _plain(task.lmms_eval_specific_kwargs)}
    if asked:
        config |= {"contents": _contents(task, asked), "files": _files(vars(task.config))}
    text = json.dumps(config, sort_keys=True)
    return f"{_number(task.config.metadata)}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def _contents(task: Any, asked: int) -> str:
    """A hash of the first questions as they are asked: texts, pictures, answers, all else that a
    score may read."""
    hashes = []
    for number in range(asked):
        doc = task.eval_docs[number]
        parts = [task.doc_to_text(doc), task.doc_to_target(doc), _shown(task.doc_to_visual(doc))]
        hashes.append(content_hash(_plain(doc), _plain(parts[:2]), parts[2]))
    return content_hash(hashes)


def _shown(value: Any) -> Any:
    """Pictures as they are, videos by their files."""
    if isinstance(value, list | tuple):
        return [_shown(entry) for entry in value]
    if isinstance(value, str) and Path(value).is_file():
        return Path(value)
    return value if isinstance(value, Image.Image) else _plain(value)


def _files(value: Any) -> list[str]:
    """Hashes of the files in which the functions of a configuration are, lmms-eval's left out."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return sorted({found for entry in value for found in _files(entry)})
    code = getattr(value, "__code__", None)
    file = Path(code.co_filename) if code else None
    if file is None or not file.is_file() or "lmms_eval" in file.parts:
        return []
    return [content_hash(file)]


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

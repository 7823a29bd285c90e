"""Hashes of contents: of what is asked, of pictures, of code.

The same on every machine: what counts is what texts say and what pictures show, not where they are
stored.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

_DIGITS = 12


def content_hash(*values: object) -> str:
    """12 hex digits over any values, in their order.

    A picture counts by its size and pixels, a `Path` by the bytes of the file, a dataclass, mapping
    or sequence by what it holds, a mapping whatever its order.

    Raises:
        TypeError: a value of another type, whose content nobody knows.
        OSError: a file that cannot be read.
    """
    digest = hashlib.sha256()
    _feed(digest, values)
    return digest.hexdigest()[:_DIGITS]


def plain_fields(thing: object) -> dict[str, Any]:
    """The public fields of an object whose contents `content_hash` knows."""
    if dataclasses.is_dataclass(thing):
        names = [field.name for field in dataclasses.fields(thing)]
    else:
        names = list(getattr(thing, "__dict__", {}))
    values = {name: getattr(thing, name) for name in names if not name.startswith("_")}
    return {name: value for name, value in values.items() if _is_plain(value)}


def _is_plain(value: object) -> bool:
    try:
        content_hash(value)
    except (TypeError, OSError):
        return False
    return True


def _feed(digest: Any, value: object) -> None:
    """Add a value, its kind and its length, so that no two values read alike."""
    if value is None or isinstance(value, str | bool | int | float):
        _feed_bytes(digest, "plain", json.dumps(value).encode())
    elif isinstance(value, bytes):
        _feed_bytes(digest, "bytes", value)
    elif isinstance(value, Path):
        _feed_bytes(digest, "file", value.read_bytes())
    elif isinstance(value, Image.Image):
        shown = value.convert("RGBA") if value.mode == "P" else value  # no palette beside pixels
        _feed_bytes(digest, f"{shown.mode} {shown.size}", shown.tobytes())
    elif isinstance(value, Mapping):
        _feed_bytes(digest, "mapping", str(len(value)).encode())
        for key in sorted(value, key=str):
            _feed(digest, str(key))
            _feed(digest, value[key])
    elif isinstance(value, list | tuple):
        _feed_bytes(digest, "sequence", str(len(value)).encode())
        for entry in value:
            _feed(digest, entry)
    elif isinstance(value, set | frozenset):
        _feed(digest, sorted(map(content_hash, value)))
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        _feed(digest, {f.name: getattr(value, f.name) for f in dataclasses.fields(value)})
    elif hasattr(value, "tolist"):  # of numpy or torch
        _feed(digest, value.tolist())
    else:
        raise TypeError(f"no hash of {type(value).__qualname__}: give numbers, texts or pictures.")


def _feed_bytes(digest: Any, kind: str, content: bytes) -> None:
    digest.update(f"{kind} {len(content)}:".encode())
    digest.update(content)

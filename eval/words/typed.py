"""How words are typed, read without torch: lists, names, fields, budgets."""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence

from ...prune.errors import MethodFieldError

DENSE = "dense"
"""The model as it is, where methods are named."""

DOWNSAMPLE = "downsample"
"""The baseline that makes pictures smaller; no method that a model is patched with."""

_AND = re.compile(r"\+(?=[A-Za-z_])")  # the plus of 1e+3 is none
_COMMA = re.compile(r",(?![^(\[]*[)\]])")


def split_list(words: Sequence[str]) -> list[str]:
    """Words given with commas, spaces or both; commas inside brackets belong to a word."""
    parts = (part.strip() for word in words for part in _COMMA.split(word))
    return [part for part in parts if part]


def split_parts(word: str) -> list[str]:
    """The methods of one word: `"divprune@0.5+fastv"` -> `["divprune@0.5", "fastv"]`."""
    return _AND.split(word)


def method_names_in(word: str) -> list[str]:
    """The names alone: `"divprune@0.5+fastv:layer=3"` -> `["divprune", "fastv"]`."""
    return [re.split("[:@]", part)[0] for part in split_parts(word)]


def parse_fields(parts: Sequence[str]) -> dict[str, object]:
    """`["layer=3", "mode=max"]` -> `{"layer": 3, "mode": "max"}`.

    Raises:
        MethodFieldError: one of them is no field=value.
    """
    fields: dict[str, object] = {}
    for part in parts:
        key, equals, text = part.partition("=")
        if not equals or not key.isidentifier():
            raise MethodFieldError(f"{part!r} is not a field of a method: write field=value.")
        try:
            value = ast.literal_eval(text)
            fields[key] = tuple(value) if isinstance(value, list) else value
        except (ValueError, SyntaxError):
            fields[key] = {"true": True, "false": False, "none": None}.get(text.lower(), text)
    return fields


def pair(key: str, value: object) -> str:
    """`key=value` so that `parse_fields` reads it as it was: a text that looks like something else
    is quoted."""
    word = f"{key}={value}"
    same = isinstance(value, str) and parse_fields([word])[key] != value
    return f"{key}={value!r}" if same else word

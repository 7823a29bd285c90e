"""Untrusted text (questions, answers, names, errors) made inert in Markdown and CSV.

HTML is escaped by the template engine.
"""

from __future__ import annotations

import re
import unicodedata

# The first part is an interval of numbers, which needs no escape.
_MARKUP = re.compile(
    r"\[[-+]?\d[\d.]*, [-+]?\d[\d.]*\](?![(\[:])|[\\`*\[\]<>&~$]|(?<![^\W_])_|_(?![^\W_])"
)
_ENTITIES = {"<": "&lt;", ">": "&gt;", "&": "&amp;"}
_FORMULA = ("=", "+", "-", "@", "\t", "\r")
_OVERRIDES = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def one_line(text: object) -> str:
    """Without line ends, and without what moves a terminal's cursor or turns the text around."""
    words = " ".join(str(text).split())
    return "".join(c for c in words if unicodedata.category(c) != "Cc" and c not in _OVERRIDES)


def markdown(text: object) -> str:
    """Text that no Markdown reader takes for markup. Pipes are left to tables."""
    return _MARKUP.sub(_escaped, one_line(text))


def _escaped(found: re.Match[str]) -> str:
    text = found[0]
    return text if len(text) > 1 else _ENTITIES.get(text, "\\" + text)


def fenced(text: str) -> str:
    """A block of code that its content cannot end."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}\n{text}\n{fence}"


def csv(value: object) -> object:
    """A cell that no spreadsheet takes for a formula: text that begins like one gets an
    apostrophe in front; numbers are left."""
    if not isinstance(value, str):
        return value
    text = value.replace("\x00", "")
    return f"'{text}" if text.lstrip().startswith(_FORMULA) or text[:1] in _FORMULA else text

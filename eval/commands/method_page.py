"""`vlmprune methods NAME`: all that a method's file and fields say, and which models it runs on."""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
import textwrap
import typing
from collections.abc import Iterable, Sequence
from typing import Literal, get_args, get_origin

from ...adapters.registry import model_names
from ...prune.budget import BUDGET_WORDS, PUBLISHED, Budget, MethodCall
from ...prune.contract import BeforeLLM, InEncoder, Method
from ...prune.errors import BudgetError
from ...prune.registry import method_class
from ..method_facts import on_tiles, reads, what_it_does
from ..models.support import support

_SECTIONS = ("Reference", "Upstream", "Differs")
_COMMON = {
    "newlines": "What becomes of newline tokens: all dropped (unless the budget has room for them),"
    " all kept and counted, or candidates like any other token. None: the first that is allowed.",
    "scope": "Whether it chooses within each tile, whose shares of the budget follow its size, or "
    "among all tokens of the image at once. None: the first that is allowed.",
    "scores": 'What ranks tokens: the attention of the CLS token, or ("received"), for encoders '
    "without one, the mean attention that each token receives.",
    "official": "The released code with its defects, to compare with it. `patch` refuses it where "
    "it would give wrong counts.",
    "layer": "The layer that is read. None: that of the paper.",
}
"""What fields mean that many methods have, where a method's own text does not say."""


def method_page(name: str, width: int) -> str:
    """The page of one method, in lines of at most `width`.

    Raises:
        UnknownMethodError: nobody registers it; it says what is near.
    """
    cls = method_class(name)
    sections = _sections(_module_doc(cls))
    places = " and ".join(place.value for place in cls().places)
    facts = [
        ("Acts", places),
        ("Reads", reads(cls())),
        *([("On tiles", on_tiles(cls))] if issubclass(cls, BeforeLLM | InEncoder) else []),
        ("Budgets", _budgets(cls)),
        ("Positions", f"{cls.positions} by default (models with M-RoPE: always original)"),
        *(fact for word in _SECTIONS for fact in _said(word, sections)),
        ("Defined in", cls.__module__),
    ]
    lines = [f"{name}: {what_it_does(cls)}", "", *_listed(facts, width), "", "Fields"]
    lines += [line for field in dataclasses.fields(cls) for line in _field(cls, field, width)]
    lines += [] if dataclasses.fields(cls) else ["  none"]
    lines += ["", "Models", *_listed(_models(name), width)]
    return "\n".join(line.rstrip() for line in lines)


# --- The texts -------------------------------------------------------------------------------


def _module_doc(cls: type[Method]) -> str:
    return inspect.cleandoc(sys.modules[cls.__module__].__doc__ or "")


def _sections(text: str) -> dict[str, str]:
    """The paragraphs of a file's head that begin with `Reference:`, `Upstream:` or `Differs:`."""
    parts = re.split(rf"^({'|'.join(_SECTIONS)}):", text, flags=re.MULTILINE)
    return {
        word: " ".join(said.split()) for word, said in zip(parts[1::2], parts[2::2], strict=True)
    }


def _said(word: str, sections: dict[str, str]) -> list[tuple[str, str]]:
    """One section, and behind a reference its addresses."""
    if word not in sections:
        return []
    text = sections[word]
    papers = re.findall(r"arXiv (\d{4}\.\d{5})", text) if word == "Reference" else []
    return [(word, text), *(("", f"https://arxiv.org/abs/{paper}") for paper in papers)]


def _budgets(cls: type[Method]) -> str:
    """The words of a budget that the method takes, and whether it needs one."""
    if why := cls.unbudgeted:
        return f"none: it {why}"
    taken = []
    for word in BUDGET_WORDS:
        try:
            MethodCall(cls(), Budget(word, 64 if "tokens" in word else 0.25))
        except BudgetError:
            continue
        taken.append(word)
    without = "one is needed" if cls().wants_budget else f"or none: as {PUBLISHED}"
    return f"{', '.join(taken)}; {without}"


# --- Fields ----------------------------------------------------------------------------------


def _field(cls: type[Method], field: dataclasses.Field[object], width: int) -> list[str]:
    kind = _kind(cls, field.name)
    meaning = _meaning(cls, field.name)
    head = f"  {field.name}: {kind} = {getattr(cls(), field.name)!r}"
    wrapped = textwrap.wrap(meaning, width, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return [head, *wrapped]


def _kind(cls: type[Method], name: str) -> str:
    """Allowed values where they are listed, else the type."""
    if issubclass(cls, BeforeLLM) and name in ("newlines", "scope"):
        allowed = cls.newline_policies if name == "newlines" else cls.scopes
        return " or ".join(map(repr, (*allowed, None)))
    try:
        kind = typing.get_type_hints(cls)[name]
    except NameError:  # of a class that was written elsewhere
        kind = next(f.type for f in dataclasses.fields(cls) if f.name == name)
    if get_origin(kind) is Literal:
        return " or ".join(map(repr, get_args(kind)))
    return kind.__name__ if isinstance(kind, type) else re.sub(r"\b\w+\.", "", str(kind))


def _meaning(cls: type[Method], name: str) -> str:
    """What the method's class says of a field, or those that it derives from; what many mean by
    it; or else what the head of the file says."""
    own = [c for c in cls.__mro__ if issubclass(c, Method) and c.__module__ != Method.__module__]
    for text in (vars(c).get("__doc__") for c in own):
        if said := _about(name, text or ""):
            return said
    return _COMMON.get(name) or _about(name, " ".join(_sections(_module_doc(cls)).values()))


def _about(name: str, text: str) -> str:
    """The sentences of a text that name a field."""
    sentences = re.split(r"(?<=[.!?])\s+(?=[A-Z`])", " ".join(text.split()))
    return " ".join(s for s in sentences if re.search(rf"`{name}\b", s)).replace("`", "")


# --- Models ----------------------------------------------------------------------------------


def _models(name: str) -> list[tuple[str, str]]:
    """Families by what becomes of the method there."""
    found = support(name)
    kinds: dict[str | None, list[str]] = {}
    for kind, (shape, reason) in found.items():
        kinds.setdefault(reason, []).append(f"{kind} ({shape})")
    runs = kinds.pop(None, [])
    facts = [("Works on", ", ".join(runs) or "none of those tried")]
    facts += [("Refuses", f"{', '.join(refused)}: {reason}") for reason, refused in kinds.items()]
    if rest := sorted({*model_names()} - {*found}):
        facts.append(("Not tried", f"{', '.join(rest)}: no sizes of a checkpoint are known here"))
    return facts


def _listed(facts: Sequence[tuple[str, str]], width: int) -> Iterable[str]:
    """A word and a text beside it, line by line."""
    indent = " " * 14
    for word, text in facts:
        first = f"  {word}".ljust(len(indent))
        yield from textwrap.wrap(
            text,
            width,
            initial_indent=first,
            subsequent_indent=indent,
            break_long_words=False,
            break_on_hyphens=False,
        )

"""What a method's class and file say of it: what it does, reads, does on tiles; its paper."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Sequence

from ..prune.contract import (
    BeforeLLM,
    Decoder,
    InEncoder,
    LayerSignal,
    Method,
    ModelShape,
    Place,
    Signal,
    Tower,
)
from ..prune.registry import is_shipped

_PUBLISHED_7B = ModelShape(
    tower=Tower(num_layers=24, has_cls=True, text_twin=True),
    decoder=Decoder(num_layers=32, hidden_size=4096, intermediate_size=11008),
)


def what_it_does(cls: type[Method]) -> str:
    """The sentence at the head of a method's file, without its name; of a method that is not
    shipped, and whose file does not begin with it, the first one of its class."""
    of_file = first_line(sys.modules[cls.__module__].__doc__)
    head = re.sub(r"\W", "", of_file.partition(": ")[0]).lower()
    generated = (cls.__doc__ or "").startswith(f"{cls.__name__}(")  # by dataclass
    is_its_own = is_shipped(cls) or generated or head == cls.__name__.lower()
    sentence = of_file if is_its_own else first_line(cls.__doc__)
    head, colon, rest = sentence.partition(": ")
    return rest.rstrip(".") if colon else head


def needs_of(method: Method) -> tuple[Signal, ...]:
    """What a method reads of LLaVA-1.5-7B, with its fields."""
    return tuple(method.needs(_PUBLISHED_7B))


def reads(method: Method) -> str:
    """Signals, those of decoder layers apart."""
    try:
        needs = needs_of(method)
    except Exception as error:  # somebody's own class may do anything
        return f"needs() raised {type(error).__name__}: {error}"
    before = _names(need for need in needs if not isinstance(need, LayerSignal))
    inside = _names(need for need in needs if isinstance(need, LayerSignal))
    parts = ["entries of the cache"] if method.place is Place.CACHE else []
    parts += [before] if before else []
    parts += [f"in the decoder: {inside}"] if inside else []
    return "; ".join(parts) or "sizes only"


def _names(signals: Iterable[Signal]) -> str:
    names = dict.fromkeys(type(signal).__name__ for signal in signals)
    words = (re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).lower() for name in names)
    text = ", ".join(_SAID.get(word, word) for word in words)
    return text.replace("cls", "CLS").replace("clip", "CLIP")


_SAID = {
    "received in layer": "received attention",
    "hidden": "hidden states",
    "mean hidden": "mean hidden states",
    "module step": "steps of attention and MLP",
}


def on_tiles(cls: type[Method]) -> str:
    """Scope and newline policy; allowed overrides in brackets."""
    if issubclass(cls, InEncoder):
        return "each tile, all newlines" if cls.restores else "each tile, newlines drop"
    if not issubclass(cls, BeforeLLM):
        return "all tokens"
    scopes = {"tile": "each tile", "image": "whole image"}
    scope, *other_scopes = (scopes[word] for word in cls.scopes)
    policy, *other_policies = cls.newline_policies
    return f"{scope}{_or(other_scopes)}, newlines {policy}{_or(other_policies)}"


def _or(words: Sequence[str]) -> str:
    return f" (or {', '.join(words)})" if words else ""


def paper(cls: type[Method]) -> str:
    """Venue and arXiv number, where the file's `Reference:` gives them."""
    text = " ".join((sys.modules[cls.__module__].__doc__ or "").split())
    _, found, reference = text.partition("Reference: ")
    if not found or reference.startswith("none"):
        return ""
    reference = reference.split(" Upstream:")[0]
    _, arxiv, number = reference.partition("arXiv ")
    return f"arXiv {number.split()[0].rstrip('.,;')}" if arxiv else ""


def first_line(text: str | None) -> str:
    """The first paragraph in one line."""
    return " ".join((text or "").split("\n\n")[0].split())

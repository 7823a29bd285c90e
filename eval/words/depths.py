"""`--depths 1,2,3`: methods in the decoder with a field `layer`, once for each of these layers."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from ...prune.contract import Place
from ...prune.errors import MethodFieldError
from .downsample import class_of
from .typed import DENSE, parse_fields, split_parts

FIELD = "layer"


def at_depths(words: Sequence[str], layers: Sequence[int]) -> list[str]:
    """The words, those of methods that cut at a layer once for each of `layers`.

    A layer that a word says itself stays; of several methods in one word all that are in the
    decoder and have the field take the same layer.

    Raises:
        MethodFieldError: no method has such a field to be set.
        UnknownMethodError: there is no such method.
    """
    if not layers:
        return list(words)
    found: list[str] = []
    for word in words:
        parts = split_parts(word)
        at = [[_at(part, layer) for part in parts] for layer in layers]
        found += dict.fromkeys("+".join(each) for each in at)
    if found == list(words):
        raise MethodFieldError(
            f"--depths: of {', '.join(words)} none cuts at a layer of the decoder that its word "
            f"does not say: name one, e.g. fastv, and random_decoder beside it."
        )
    return found


def _at(part: str, layer: int) -> str:
    """A method's word with its layer, where it has one to be set."""
    head, at, budget = part.partition("@")
    name, *fields = head.split(":")
    if name == DENSE or FIELD in parse_fields(fields) or not cuts_at_a_layer(name):
        return part
    return f"{head}:{FIELD}={layer}{at}{budget}"


def cuts_at_a_layer(name: str) -> bool:
    """Whether a method acts in the decoder, behind a layer that its field says; before the LLM the
    field of this name is a layer of the encoder."""
    cls = class_of(name)
    return cls.place is Place.DECODER and FIELD in {field.name for field in dataclasses.fields(cls)}  # type: ignore[arg-type]

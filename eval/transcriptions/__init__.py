"""The authors' selection steps, written plainly: what `vlmprune bench select` times us against.

One file a method, under the method's registry name. Each follows the steps of the paper's released
code and spends what that code spends (full attention maps for one row, loops over tokens, repeated
gathers), in words of our own; where no code was released, the steps of the paper. Every file has

    MAPS                               layers whose attention maps that code gets from the encoder
    read(picture, *maps) -> scores     what the method looks at
    choose(picture, scores, keep)      the tokens that stay: indices, or (MOVES_ROWS) their rows

and the plain functions behind them, which tests compare with the authors' golden data. Layer
numbers and sizes are those of CLIP-L/336 with 24 layers, for which that code was written.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple

from .picture import Picture


class Transcription(NamedTuple):
    """The steps of a method; `moves_rows` if choosing includes moving rows of features."""

    maps: tuple[int, ...]
    read: Callable[..., Any]
    choose: Callable[[Picture, Any, int], Any]
    moves_rows: bool


def find(name: str, *, tiles: int) -> Transcription | None:
    """The transcription of method `name` for images of so many tiles, if there is one."""
    module_name = f"{__name__}.{name}"
    if find_spec(module_name) is None:
        return None
    module = import_module(module_name)
    if not hasattr(module, "choose") or tiles < getattr(module, "LEAST_TILES", 1):
        return None
    maps = getattr(module, "MAPS", ())
    return Transcription(maps, module.read, module.choose, getattr(module, "MOVES_ROWS", False))

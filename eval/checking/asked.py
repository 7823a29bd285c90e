"""What a method was asked while a model ran, so that it can be asked the same again alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from ...prune.contract import Attending, Choosing, Compressing, InEncoder, Method

CALLS: tuple[tuple[Any, tuple[str, ...]], ...] = (
    (InEncoder, ("reduce",)),
    (Choosing, ("select_batch", "select_adaptive")),
    (Compressing, ("compress",)),
    (Attending, ("attended",)),
)
"""The functions that choose, by kind of method."""


@dataclass(frozen=True)
class Question:
    """One call of a function that chooses."""

    call: str
    given: tuple[Any, ...]
    """Copies of its arguments."""

    def ask(self, method: Method) -> Any:
        """The answer of a method, of the same kind as the one that was asked."""
        with torch.no_grad():
            return getattr(method, self.call)(*self.given)


def listening(method: Method) -> tuple[Method, list[Question]]:
    """The same method, which notes what it is asked."""
    noted: list[Question] = []
    cls = type(method)
    (calls,) = (names for kind, names in CALLS if isinstance(method, kind))
    if getattr(cls, "select_batch", None) is Choosing.select_batch:
        calls = ("select", *calls[1:])

    def noting(name: str) -> Callable[..., Any]:
        def call(self: Any, *given: Any) -> Any:
            noted.append(Question(name, tuple(map(copied, given))))
            return getattr(cls, name)(self, *given)

        return call

    own = {"__module__": cls.__module__, **{name: noting(name) for name in calls}}
    made: Any = object.__new__(type(cls.__name__, (cls,), own))
    made.__dict__.update(vars(method))
    return made, noted


def copied(value: Any) -> Any:
    """The same with every tensor cloned."""
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, list | tuple):
        return type(value)(map(copied, value))
    if isinstance(value, dict):
        made: Any = _like(value)
        made.update({key: copied(each) for key, each in value.items()})
        return made
    if is_dataclass(value) and not isinstance(value, type) and tensors_of(value):
        made = type(value).__new__(type(value))
        for f in fields(value):
            object.__setattr__(made, f.name, copied(getattr(value, f.name)))
        return made
    return value


def tensors_of(value: Any) -> list[Tensor]:
    """All tensors in arguments or answers, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, list | tuple):
        return [tensor for each in value for tensor in tensors_of(each)]
    if isinstance(value, dict):
        return tensors_of(list(value.values()))
    if is_dataclass(value) and not isinstance(value, type):
        return tensors_of([getattr(value, f.name) for f in fields(value)])
    return []


def same(one: Any, two: Any) -> bool:
    """Whether two arguments or answers hold equal tensors; NaN is equal to itself."""
    pairs = list(zip(ours := tensors_of(one), theirs := tensors_of(two), strict=False))
    return len(ours) == len(theirs) and all(
        a.shape == b.shape and a.dtype == b.dtype and bool(((a == b) | ((a != a) & (b != b))).all())
        for a, b in pairs
    )


def _like(value: dict[Any, Any]) -> dict[Any, Any]:
    """An empty dict of the same class, with its attributes."""
    made = type(value).__new__(type(value))
    if hasattr(value, "__dict__"):
        vars(made).update(vars(value))
    return made

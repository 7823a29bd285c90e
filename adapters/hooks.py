"""Hooks that are on a model's modules for as long as somebody needs them.

A hook costs some microseconds for each layer and step, and most are needed by prefills alone: a
decoding step passes layers that are as they were before the patch. Calls of several threads may
need different ones at a time, and all hooks ask the call of their own thread what to do.
"""

from __future__ import annotations

import functools
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from torch import nn

from ..prune.errors import UnsupportedFeatureError

Undo = Callable[[], None]
Spot = tuple[str, int]
"""The kind of a hook, and the number of its layer."""
Spots = frozenset[Spot]


class Uncopied:
    """What hooks on a model belong to: no copy of it would be on another."""

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise UnsupportedFeatureError(
            "A patched model cannot be copied or pickled, because its hooks belong to this one "
            "object: call vlmprune.unpatch(model) first. model.save_pretrained() works as it is."
        )


class Hooks:
    """The hooks of one patch, counted by who needs them.

    Whoever holds spots finds their hooks in place until it releases them. Hooks of others come and
    go meanwhile, also between the moment when torch lists a module's hooks and that when it calls
    them: such a hook may be called once more or without keyword arguments, and must do nothing.
    """

    def __init__(self, install: Callable[[Spot], Undo]) -> None:
        """`install` puts the hook of a spot on and returns what takes it off."""
        self._install = install
        self._holders: Counter[Spots] = Counter()
        self._needed: Counter[Spot] = Counter()
        self._undo: dict[Spot, Undo] = {}
        self._on = True
        self._lock = threading.Lock()

    def hold(self, spots: Spots) -> None:
        """Somebody needs all these."""
        with self._lock:
            self._holders[spots] += 1
            if self._holders[spots] == 1:
                self._needed.update(spots)
                self._put_on(spots)

    def release(self, spots: Spots) -> None:
        """Somebody who held them needs them no more."""
        with self._lock:
            self._holders[spots] -= 1
            if self._holders[spots]:
                return
            del self._holders[spots]
            self._needed.subtract(spots)
            for spot in spots:
                if not self._needed[spot]:
                    del self._needed[spot]
                    if (undo := self._undo.pop(spot, None)) is not None:
                        undo()

    def take_off(self) -> None:
        """All of them, whoever still runs."""
        with self._lock:
            self._on = False
            while self._undo:
                self._undo.popitem()[1]()

    def put_back(self) -> None:
        """All that are needed, after `take_off`."""
        with self._lock:
            self._on = True
            self._put_on(frozenset(self._needed))

    def _put_on(self, spots: Spots) -> None:
        for spot in sorted(spots):
            if self._on and spot not in self._undo:
                self._undo[spot] = self._install(spot)


def before(module: nn.Module, hook: Callable[..., Any], *, with_kwargs: bool = False) -> Undo:
    """Put a hook in front of a module's forward."""
    return module.register_forward_pre_hook(hook, with_kwargs=with_kwargs).remove


def behind(
    module: nn.Module, hook: Callable[..., Any], *, with_kwargs: bool = False, always: bool = False
) -> Undo:
    """Put a hook behind a module's forward; `always`: also where that raises."""
    return module.register_forward_hook(hook, with_kwargs=with_kwargs, always_call=always).remove


def shadow(
    owner: nn.Module,
    name: str,
    replacement: Callable[..., Any],
    original: Callable[..., Any] | None = None,
) -> Undo:
    """Shadow a method on the instance, with the original as the first argument of `replacement`;
    returns what undoes it."""
    original = original or getattr(owner, name)
    shadowed = owner.__dict__.get(name)
    bound = functools.wraps(original)(functools.partial(replacement, original))
    owner.__dict__[name] = bound

    def undo() -> None:
        if shadowed is None:
            owner.__dict__.pop(name, None)
        else:
            owner.__dict__[name] = shadowed

    return undo


def all_of(undos: Sequence[Undo]) -> Undo:
    """One that undoes several, the last first."""

    def undo() -> None:
        for one in reversed(undos):
            one()

    return undo

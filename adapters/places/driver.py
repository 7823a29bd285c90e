"""What every place has: a driver, which is all that the engine knows of it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence

from ..hooks import Undo, all_of

PutOn = Callable[[int], Undo]
"""Puts a hook on a layer."""


class Driver:
    """What is on a model for one place. By itself it puts nothing on."""

    hooks: Mapping[str, PutOn] = {}
    """By its kind, what comes and goes: `Setup.standing` and `Setup.passing` say when."""

    def install(self) -> Undo:
        """What is on the model at all times."""
        return all_of([])

    def name_tap(self, kind: str, layer: int) -> None:
        """Register the name of the tap that is a hook of this kind, if it is one: names stay while
        taps come and go."""


def hooks_of(drivers: Sequence[Driver]) -> Mapping[str, PutOn]:
    """Every kind of hook, put on by all drivers that have it: a model may have several encoders, of
    as many layers each."""

    def put_on(kind: str, layer: int) -> Undo:
        return all_of([driver.hooks[kind](layer) for driver in drivers if kind in driver.hooks])

    kinds = {kind for driver in drivers for kind in driver.hooks}
    return {kind: functools.partial(put_on, kind) for kind in kinds}

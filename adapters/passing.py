"""Hooks that are on a model only while a call needs them.

A hook costs some microseconds for each layer and step, and most are needed by prefills alone: a
decoding step passes layers that are as they were before the patch.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

Undo = Callable[[], None]


class PassingHooks:
    """Hooks that go on together: with the first call that needs them, until the last one ends."""

    def __init__(self) -> None:
        self._installers: list[Callable[[], Undo]] = []
        self._undo: list[Undo] = []
        self._calls = 0
        self._lock = threading.Lock()  # calls of several threads may overlap

    def add(self, install: Callable[[], Undo]) -> None:
        """`install` puts a hook on and returns what takes it off."""
        self._installers.append(install)

    def on(self) -> None:
        """A call begins."""
        with self._lock:
            self._calls += 1
            if self._calls == 1:
                self._undo = [install() for install in self._installers]

    def off(self) -> None:
        """A call ends."""
        with self._lock:
            self._calls -= 1
            if self._calls == 0:
                self._take_off()

    def remove(self) -> None:
        """For good, whoever still runs."""
        with self._lock:
            self._installers.clear()
            self._take_off()

    def _take_off(self) -> None:
        while self._undo:
            self._undo.pop()()

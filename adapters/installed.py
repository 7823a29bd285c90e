"""What every patch has, whatever kind of model it is on: hooks, a setup, the way to take it off."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from ..prune.budget import MethodCall
from ..prune.contract import Positions
from .budgets import Budgets
from .clip_text import ClipText
from .family import Fit, Model
from .hooks import Hooks, Spot, Uncopied, Undo
from .patch_setup import Setup
from .places.call import Calling, Wish
from .places.driver import Driver, PutOn, hooks_of
from .remember import ImageMemory
from .report import Last
from .tap import Names


class Installed(Uncopied, ABC):
    """Everything that `patch` installs on one model; `remove()` takes all of it away.

    What is on the model at all times asks `_flight` what belongs to the call of its thread. Hooks
    that depend on the methods are at `Spots`, for as long as the setup or a call needs them.
    Subclasses call `_start` with the drivers of their places when they are complete.
    """

    _flight: Calling
    fit: Fit = "stretch"
    """How pictures are brought to the token grid."""

    def __init__(self, model: Model, setup: Setup) -> None:
        self.model = model
        self.setup = setup
        """What calls that begin now run with, where their threads ask for nothing else."""
        self.memory: ImageMemory | None = None
        self._hooks = Hooks(self._install_at)
        self._names = Names(model)
        self._undo: list[Undo] = []
        self._drivers: Sequence[Driver] = ()
        self._put_on: Mapping[str, PutOn] = {}
        self._exchange = threading.Lock()

    def _start(self, drivers: Sequence[Driver]) -> None:
        self._drivers, self._put_on = drivers, hooks_of(drivers)
        try:
            self._install()
            self._name_taps()
            self._hooks.hold(self.setup.standing)
        except BaseException:
            self.remove()
            raise

    # --- what kinds of models differ in -------------------------------------------------------

    @abstractmethod
    def _install_own(self) -> Iterator[Undo]:
        """Put on, one after the other, what is on the model at all times beside the drivers'."""

    @abstractmethod
    def planned(
        self,
        calls: tuple[MethodCall, ...],
        positions: Positions | None,
        clip: ClipText | None,
    ) -> Setup:
        """A setup of other methods for this model, refused as by `patch`."""

    @abstractmethod
    def check(self, budgets: Budgets) -> Setup:
        """The setup with other budgets, if they can be reached."""

    @abstractmethod
    def refuse_compiled(self) -> None:
        """Raise `UnsupportedModelError` where compiled code would not see other hooks."""

    @property
    def unread_layers(self) -> int:
        """Encoder layers that do not run in `forward` and `generate`."""
        return 0

    @property
    def last(self) -> Last | None:
        """What the last pass of this thread did."""
        return self._flight.last

    # --- on and off ---------------------------------------------------------------------------

    def _install(self) -> None:
        """Put on what is on the model at all times."""
        for driver in self._drivers:
            self._undo.append(driver.install())
        for undo in self._install_own():
            self._undo.append(undo)

    def _install_at(self, spot: Spot) -> Undo:
        kind, layer = spot
        return self._put_on[kind](layer)

    def _name_taps(self) -> None:
        for kind, layer in self.setup.standing | self.setup.passing:
            for driver in self._drivers:
                driver.name_tap(kind, layer)

    def remove(self) -> None:
        """Put the model back exactly as it was. A second call does nothing."""
        self.setup.ticket.active = False
        if self.memory is not None:
            self.memory.forget()
        self._hooks.take_off()
        self._names.release()
        while self._undo:
            self._undo.pop()()

    def put_back(self) -> None:
        """Patch the model again as it was before `remove()`."""
        self.setup.ticket.active = True
        self._install()
        self._name_taps()
        self._hooks.put_back()

    # --- what calls run with ------------------------------------------------------------------

    def exchange(self, setup: Setup) -> None:
        """Let calls that begin from now on run with another setup; others end with theirs."""
        with self._exchange:
            self._hooks.hold(setup.standing)
            before, self.setup = self.setup, setup
            self._name_taps()
            self._hooks.release(before.standing)

    def wanted(self) -> Setup | None:
        """What a call that begins now in this thread runs with; None: without any method."""
        wish = self._flight.wish
        if wish is None:
            return self.setup
        return wish.applied(self.setup) if isinstance(wish, Budgets) else None

    @contextmanager
    def wishing(self, wish: Wish) -> Iterator[None]:
        """Calls of this thread that begin within it run with something else."""
        flight = self._flight
        outer, flight.wish = flight.wish, wish
        try:
            yield
        finally:
            flight.wish = outer

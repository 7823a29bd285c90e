"""What belongs to the call in flight of one thread: threads that share a model do not meet."""

from __future__ import annotations

import threading
from typing import Literal

from torch import Tensor

from ..both_ways import Given
from ..budgets import Budgets
from ..cache.continuation import Continued
from ..encoded import Encoded
from ..family import Modality
from ..hooks import Hooks, Spots
from ..patch_setup import Setup
from ..report import NO_IMAGES, Last
from ..sequence.prompt import Prompt
from .choosing import Chosen
from .prefill import Prefill

Wish = Budgets | Literal["dense"]
"""What a thread asks for its calls, beside the settings of the patch."""


class Calling(threading.local):
    """What one thread asks for, and what its last call did."""

    def __init__(self) -> None:
        self.wish: Wish | None = None
        self.last: Last | None = None
        """What the thread's last pass over images did."""


class InFlight(Calling):
    """One generate(), or one forward() of the model outside of it.

    `setup`, `chosen` and `visual_mask` are fixed by generate() for all steps; the rest belongs to
    one call of the model, and `forget` ends it.
    """

    def __init__(self, hooks: Hooks) -> None:
        super().__init__()
        self._hooks = hooks
        self._held: list[Spots] = []
        """Hooks that are there for this call."""
        self.setup: Setup | None = None
        """What the call runs with, fixed when it began; None: without any method."""
        self.prompt: Prompt | None = None
        """What the images that are encoded next belong to."""
        self.visual: dict[Modality, Tensor] = {}
        """(B, L) bool each, the columns of visual tokens."""
        self.encoded: dict[Modality, Encoded] = {}
        self.handed: dict[str, Encoded | None] = {}
        """What is known of outputs that the model was given, by modality."""
        self.given: Given | None = None
        """What a core was given that makes the decoder's masks itself."""
        self.visual_mask: Tensor | None = None
        self.chosen: Chosen | None = None
        """Within generate(): without a cache every step prefills again, and must not choose anew
        with its newest token."""
        self.prefill: Prefill | None = None
        self.continued: Continued | None = None
        self.tables: dict[int, tuple[Tensor, Tensor]] = {}
        """Rotary tables of the attention modules, for methods that undo the rotation."""
        self.unpruned: str = NO_IMAGES
        """Why the call prunes nothing, if it is a prefill."""

    @property
    def active(self) -> bool:
        """Whether generate() or forward() is running, who read an encoder's output alone."""
        return self.chosen is not None or bool(self.visual)

    def hold(self, spots: Spots) -> None:
        """Keep hooks in place until `release`."""
        if spots:
            self._hooks.hold(spots)
            self._held.append(spots)

    def release(self) -> None:
        """Give back the hooks of this call."""
        while self._held:
            self._hooks.release(self._held.pop())

    def forget(self) -> None:
        """Everything about one call of the model."""
        self.release()
        self.visual, self.encoded, self.prefill, self.prompt = {}, {}, None, None
        self.continued, self.tables, self.unpruned = None, {}, NO_IMAGES
        self.given = None

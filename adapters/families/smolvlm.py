"""SmolVLM and SmolVLM2: Idefics 3 in small, with frames of videos as images."""

from __future__ import annotations

from torch import Tensor

from ..family import Call
from .idefics3 import Idefics3


class SmolVLM(Idefics3):
    name = "smolvlm"

    def _real(self, call: Call) -> Tensor:
        """Of pixels that are zeros alone the first tile is seen."""
        real = super()._real(call)
        real[0, 0] |= ~real.any()
        return real

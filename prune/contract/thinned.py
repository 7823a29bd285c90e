"""What a decoder layer computes with less of, beside tokens."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Thinned:
    """A decoder layer that leaves out more than tokens, see `InDecoder.thinned`.

    `neurons` is the share of the MLP's neurons with which a single new token passes it, behind a
    prompt with images; the prompt itself passes all.
    """

    layer: int
    neurons: float = 1.0

    def neurons_of(self, width: int) -> int:
        """How many of `width` neurons stay."""
        return max(1, round(self.neurons * width))

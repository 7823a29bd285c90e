"""What a decoder layer computes with less of, beside tokens."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Thinned:
    """A decoder layer that leaves out more than tokens, see `InDecoder.thinned`.

    `heads` is the share of its key heads, each with all queries that read it, that attention goes
    through: those that are out in a layer are out in all deeper ones. `values` is the share of the
    keys that a query sees in a head whose values are read, those of the largest attention; the
    others give nothing. `neurons` is the share of the MLP's neurons with which a single new token
    passes it, behind a prompt with images; the prompt itself passes all.
    """

    layer: int
    heads: float = 1.0
    values: float = 1.0
    neurons: float = 1.0

    @property
    def attention(self) -> bool:
        """Whether its attention is another one."""
        return self.heads < 1 or self.values < 1

    def heads_of(self, count: int) -> int:
        """How many of `count` key heads stay."""
        return max(1, round(self.heads * count))

    def neurons_of(self, width: int) -> int:
        """How many of `width` neurons stay."""
        return max(1, round(self.neurons * width))

"""random_encoder: in three blocks of the encoder rows leave by chance, the floor for methods there.

Reference: none; the usual baseline.
Upstream: none.
Differs: what leaves depends on `seed` and the places of the rows alone: pictures of one size lose
    the same places, in every batch, process and run, and on every device. Cuts and counts are those
    of EViT under a budget.
"""

from __future__ import annotations

from dataclasses import dataclass

from ...blocks import FewCuts
from ...contract import EncoderRows, Reduction
from ...fields import check_int
from ...ops.drawn import drawn
from ...ops.topk import ascending
from ...registry import register


@register("random_encoder")
@dataclass(frozen=True, kw_only=True)
class RandomEncoder(FewCuts):
    """A random subset of the places. `seed` chooses another one."""

    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_int("seed", self.seed, hint="give a whole number")

    def reduce(self, rows: EncoderRows, keep: int) -> Reduction:
        order = drawn(rows.numbers, self.seed).argsort(dim=1, stable=True)
        return Reduction(source=ascending(order[:, :keep]))

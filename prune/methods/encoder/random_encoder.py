"""random_encoder: in three blocks of the encoder rows leave by chance, the floor for methods there.

Reference: none; the usual baseline.
Upstream: none.
Differs: what leaves depends on `seed` and the places of the rows alone: pictures of one size lose
    the same places, in every batch, process and run, and on every device. Cuts and counts are those
    of EViT under a budget.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ...blocks import FewCuts
from ...contract import EncoderRows, Reduction
from ...fields import check_int
from ...ops.topk import ascending
from ...registry import register

_MASK = 2**32 - 1


@register("random_encoder")
@dataclass(frozen=True, kw_only=True)
class RandomEncoder(FewCuts):
    """A random subset of the places. `seed` chooses another one."""

    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_int("seed", self.seed, hint="give a whole number")

    def reduce(self, rows: EncoderRows, keep: int) -> Reduction:
        drawn = _mixed(_mixed(rows.numbers + 1) + (self.seed * 0x9E3779B9 & _MASK))
        return Reduction(source=ascending(drawn.argsort(dim=1, stable=True)[:, :keep]))


def _mixed(numbers: Tensor) -> Tensor:
    """Whole numbers of 32 bits, each as another one that looks drawn: MurmurHash3's last step."""
    numbers = numbers & _MASK
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        numbers = (numbers ^ (numbers >> shift)) * factor & _MASK
    return numbers ^ (numbers >> 16)

"""Blocks of a vision encoder in which rows leave, and how many are alive after each."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

from .amount import Budget
from .contract import BlockCut, InEncoder, Tower
from .errors import BudgetError, MethodFieldError, UnsupportedModelError
from .layers import nearest_layer, scale_layer, user_layer
from .schedule import check_layers


@dataclass(frozen=True, kw_only=True)
class FewCuts(InEncoder):
    """A method that cuts a few blocks; a budget keeps the same share of the rows at each.

    `layers`: the blocks that are cut, None for those at the published depths.
    """

    published: ClassVar[tuple[int, ...]] = (3, 6, 9)
    """Of 12 blocks."""

    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layers is not None:
            check_layers(self.layers)

    def blocks(self, tower: Tower) -> tuple[BlockCut, ...]:
        blocks = blocks_at(self.layers, self.published, tower, depth_published=12)
        return tuple(BlockCut(block) for block in blocks)

    def block_counts(self, tower: Tower, rows: int, keep: int | None) -> tuple[int, ...]:
        if keep is None:
            raise BudgetError(f"{self.name} needs a budget, e.g. keep_ratio=0.25.")
        return geometric(rows, keep, len(self.blocks(tower)))


def seeing_all(tower: Tower) -> tuple[int, ...]:
    """The blocks that can be cut: they see the whole picture, and the projector reads them.

    Raises:
        UnsupportedModelError: there is none.
    """
    every = range(tower.num_layers) if tower.full_attention is None else tower.full_attention
    found = tuple(block for block in every if block < tower.depth_read)
    if not found:
        raise UnsupportedModelError(
            f"No block of this vision encoder sees the whole picture before the projector reads "
            f"block {tower.depth_read - 1}: use a method that acts before the LLM (divprune)."
        )
    return found


def blocks_at(
    given: Sequence[int] | None, published: Iterable[int], tower: Tower, *, depth_published: int
) -> tuple[int, ...]:
    """The blocks that a method cuts: the user's `layers`, or those at the published depths.

    These snap to the nearest block that can be cut, each once: a shallow or windowed encoder has
    fewer of them than the paper.

    Raises:
        MethodFieldError: the user's do not ascend, or cannot be cut.
        UnsupportedModelError: no block can be cut.
    """
    allowed, depth = seeing_all(tower), tower.num_layers
    if given is None:
        scaled = (scale_layer(b, depth_published=depth_published, depth=depth) for b in published)
        return tuple(sorted({nearest_layer(block, allowed) for block in scaled}))
    blocks = tuple(user_layer(block, depth=depth, field="layers") for block in given)
    if not set(blocks) <= set(allowed) or any(one >= two for one, two in pairwise(blocks)):
        raise MethodFieldError(
            f"layers={tuple(given)!r} are the blocks {', '.join(map(str, blocks))} of this vision "
            f"encoder: give ascending ones of {', '.join(map(str, allowed))}."
        )
    return blocks


def refuse_both(name: str, budget: Budget | None, **own: object) -> None:
    """Raise `BudgetError` for a budget beside a field that says the same."""
    for field, value in own.items():
        if budget is not None and value is not None:
            raise BudgetError(
                f"{name} is given {budget} and {field}={value!r}, which each say how many rows "
                f"stay: leave one of them out."
            )


def geometric(rows: int, keep: int, cuts: int) -> tuple[int, ...]:
    """The same share of the rows stays at each of some cuts, `keep` behind the last."""
    counts = [max(keep, round(rows * (keep / rows) ** (i / cuts))) for i in range(1, cuts)]
    return (*counts, keep)


def merging(rows: int, steps: Iterable[int]) -> tuple[int, ...]:
    """Rows alive where each block merges a number of them, half of what it has at most."""
    counts = []
    for step in steps:
        rows -= min(step, rows // 2)
        counts.append(rows)
    return tuple(counts)


def merging_to(name: str, rows: int, keep: int, blocks: int) -> tuple[int, ...]:
    """Rows alive where each block merges the same number, the smallest that comes to `keep`; what
    is missing for that many is the part of the last block that merges.

    Raises:
        BudgetError: half of the rows at each block is not enough.
    """
    least = merging(rows, [rows] * blocks)[-1]
    if keep < least:
        raise BudgetError(
            f"{name} cannot merge {rows} rows of a picture into {keep}: half of the rows is the "
            f"most that each of its {blocks} blocks can merge. The nearest count is {least}."
        )
    step = bisect_left(
        range(rows), True, key=lambda step: merging(rows, [step] * blocks)[-1] <= keep
    )
    return tuple(max(keep, count) for count in merging(rows, [step] * blocks))

"""Pictures whose rows leave inside the vision encoder: how many enter each of its blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from ...prune.budget import MethodCall, plan
from ...prune.contract import InEncoder, ModelShape, Place
from ...prune.reductions import counts_of, rows_kept

if TYPE_CHECKING:
    from ...adapters.handle import Handle
    from ...adapters.report import Last

Grid = tuple[int, int]
"""Rows and columns of a picture."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shortened:
    """One picture (tile, frame). Rows are patches, or merge units where the projector merges
    patches; CLS is not counted, nor are rows that only fill a batch up."""

    first: int
    """The first block that rows leave in."""
    entering: tuple[tuple[int, int], ...]
    """Per block from the first on: rows at its attention, and at its MLP."""
    restored: int | None = None
    """Rows that come back behind the last block that is read; None: none do."""

    def at(self, block: int, whole: int) -> tuple[int, int]:
        """Rows at the attention and at the MLP of a block, `whole` before the first cut."""
        return (whole, whole) if block < self.first else self.entering[block - self.first]

    def behind(self, block: int, whole: int, *, last: bool) -> int:
        """Rows that a projector reads behind a block; `last`: of those that are read."""
        return self.restored if last and self.restored is not None else self.at(block, whole)[1]


def measured(
    handle: Handle | None, last: Last | None, pictures: Sequence[Sequence[Grid]], shape: ModelShape
) -> list[list[Shortened | None]]:
    """What the last prefill did to the pictures of each modality, in the order in which the model
    encodes these; None: all rows stayed.

    Args:
        pictures: per modality, those that the encoder saw.
    """
    method = _in_encoder(handle.methods if handle is not None else ())
    found: list[list[Shortened | None]] = [[None] * len(seen) for seen in pictures]
    if method is None or last is None or not last.encoder:
        return found
    first = method.blocks(shape.tower)[0].block
    blocks_cut = shape.tower.num_layers - first
    passes = [last.encoder[n : n + blocks_cut] for n in range(0, len(last.encoder), blocks_cut)]
    for own, seen in zip(found, pictures, strict=True):
        if not seen or not passes or len(passes[0][0][0]) != len(seen):
            continue  # nothing left: the next pass is of the next modality
        blocks = passes.pop(0)
        own[:] = [
            Shortened(
                first=first,
                entering=tuple((attention[n], mlp[n]) for attention, mlp in blocks),
                restored=prod(grid) if method.restores else None,
            )
            for n, grid in enumerate(seen)
        ]
    return found


def reckoned(
    calls: Sequence[MethodCall], pictures: Sequence[Grid], tokens: int, shape: ModelShape
) -> list[Shortened | None]:
    """The same from sizes alone, of the pictures of one image; padding counts as patches.

    Args:
        tokens: N of the image, newlines included.

    Raises:
        BudgetError: the method cannot come to its budget.
    """
    method = _in_encoder(calls)
    if method is None:
        return [None] * len(pictures)
    call = next(call for call in calls if call.method is method)
    whole = [rows * columns for rows, columns in pictures]
    stages = plan(tokens, calls, shape)
    planned = next((one.keep for one in stages if one.place is Place.ENCODER), tokens)
    keep = rows_kept(call, tokens, sum(whole), planned)
    tower = shape.tower
    cuts = method.blocks(tower)
    found: list[Shortened | None] = []
    for rows, counts in zip(whole, counts_of(method, tower, whole, keep), strict=True):
        entering, now = [], rows
        for block in range(cuts[0].block, tower.num_layers):
            left = dict(zip(cuts, counts, strict=True))
            in_front = [left[cut] for cut in cuts if (cut.block, cut.at) == (block, "block")]
            before = in_front[0] if in_front else now
            inside = [left[cut] for cut in cuts if (cut.block, cut.at) == (block, "mlp")]
            now = inside[0] if inside else before
            entering.append((before, now))
        restored = rows if method.restores else None
        found.append(Shortened(first=cuts[0].block, entering=tuple(entering), restored=restored))
    return found


def _in_encoder(calls: Sequence[MethodCall]) -> InEncoder | None:
    return next((call.method for call in calls if isinstance(call.method, InEncoder)), None)

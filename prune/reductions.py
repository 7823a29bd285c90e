"""Methods inside the vision encoder: how many rows of each picture stay, and which, checked."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .answers.answer import looks_at_values
from .answers.reductions import check_counts, check_reduction
from .budget import MethodCall, round_tokens
from .contract import EncoderRows, InEncoder, Reduction, Tower
from .declared import Seen
from .ops.spread import share


def rows_kept(call: MethodCall, num_tokens: int, num_patches: int, planned: int) -> int | None:
    """Rows of an image that are to stay in the encoder; None: as the method's fields say.

    Args:
        num_tokens: N of the image, newlines included.
        num_patches: those of them that the encoder sees.
        planned: what `budget.plan` found for the method's stage.
    """
    if call.budget is None:
        return None
    method = call.method
    if not (isinstance(method, InEncoder) and method.restores):
        return min(planned, num_patches)
    if call.budget.word == "keep_ratio":
        return round_tokens(call.budget.value, num_patches)
    return (
        min(num_patches, int(call.budget.value)) if call.budget.value < num_tokens else num_patches
    )


def counts_of(
    method: InEncoder,
    tower: Tower,
    pictures: Sequence[int],
    keep: int | None,
    grids: Sequence[tuple[int, int]] | None = None,
) -> list[tuple[int, ...]]:
    """Rows alive after each cut in each picture of an image.

    Args:
        pictures: patches (or units) of each picture that reach the prompt.
        keep: of all of them; None: as the method's fields say.
        grids: rows and columns of each picture, where `keep` need not be exact; see
            `InEncoder.reachable`.

    Raises:
        BudgetError: the method cannot come to that many.
        MethodAnswerError: it gave other counts than it was asked for.
    """
    cuts = len(method.blocks(tower))
    shares: Sequence[int | None] = [None] * len(pictures)
    if keep is not None:
        shares = share(keep, pictures) if keep < sum(pictures) else pictures
        if grids is not None:
            both = zip(grids, shares, strict=True)
            shares = [method.reachable(grid, max(1, own)) for grid, own in both]
    found: list[tuple[int, ...]] = []
    for rows, own in zip(pictures, shares, strict=True):
        if not rows or own == 0:
            found.append((0,) * cuts)
        elif own == rows:
            found.append((rows,) * cuts)
        else:
            given = method.block_counts(tower, rows, own)
            found.append(check_counts(method, given, rows, own, cuts))
    return found


def reduce(method: InEncoder, rows: EncoderRows, keep: int, *, debug: bool = False) -> Reduction:
    """What `method` makes of rows, checked: exactly `keep` of each picture.

    Args:
        debug: look at the numbers that a shipped method returns, too: the host waits for them.

    Raises:
        MethodAnswerError: the method returned something else than it was asked for.
    """
    signals = Seen(method, rows.signals)
    given = EncoderRows(
        cut=rows.cut,
        tower=rows.tower,
        grid=rows.grid,
        numbers=rows.numbers,
        sizes=rows.sizes,
        signals=signals,
    )
    with torch.no_grad():
        made = method.reduce(given, keep)
    return check_reduction(method, rows, keep, made, values=looks_at_values(method, debug))

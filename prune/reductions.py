"""Methods inside the vision encoder: how many rows of each picture stay, and which, checked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor

from .answers import looks_at_values
from .budget import MethodCall, round_tokens
from .contract import EncoderRows, InEncoder, Reduction, Tower
from .declared import Seen
from .errors import MethodAnswerError
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
            counts = method.block_counts(tower, rows, own)
            _check_counts(method, counts, rows, own, cuts)
            found.append(counts)
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
    _check_reduction(method, rows, keep, made)
    if looks_at_values(method, debug):
        _check_numbers(method, rows, made)
    return made


def _check_counts(
    method: InEncoder, counts: object, rows: int, keep: int | None, cuts: int
) -> None:
    def refuse(rule: str) -> NoReturn:
        raise MethodAnswerError(
            f"{method.name}.block_counts returned {counts!r} for {rows} rows of which {keep} are "
            f"to stay: {rule}. Return the rows alive after each of `blocks`, as a tuple."
        )

    whole = isinstance(counts, tuple) and all(type(count) is int for count in counts)
    if not whole or len(counts) != cuts:  # type: ignore[arg-type]
        refuse(f"it must be {cuts} whole numbers")
    before = rows
    for count in counts:  # type: ignore[attr-defined]
        if not 1 <= count <= before:
            refuse("each must be at least 1, and at most the one before")
        before = count
    if keep is not None and before != keep:
        refuse(f"the last must be {keep}")


def _check_reduction(method: InEncoder, rows: EncoderRows, keep: int, made: object) -> None:
    batch, count = rows.numbers.shape

    def refuse(what: str, rule: str) -> NoReturn:
        raise MethodAnswerError(f"{method.name}.reduce returned {what}, but {rule}.")

    if not isinstance(made, Reduction):
        refuse(type(made).__name__, "it must be a Reduction")
    if made.source.dtype != torch.int64 or made.source.shape != (batch, keep):
        refuse(f"source {_said(made.source)}", f"source must be int64 {(batch, keep)}")
    for name, value, shape in (
        ("owner", made.owner, (batch, count)),
        ("weights", made.weights, (batch, count)),
        ("matrix", made.matrix, (batch, keep, count)),
    ):
        if value is not None and value.shape != shape:
            refuse(f"{name} {_said(value)}", f"{name} must be {shape}")
    if made.weights is not None and made.owner is None:
        refuse("weights without owner", "owner says which new row each row goes into")


def _check_numbers(method: InEncoder, rows: EncoderRows, made: Reduction) -> None:
    def refuse(what: str, rule: str) -> NoReturn:
        raise MethodAnswerError(f"{method.name}.reduce returned {what}, but {rule}.")

    for name, value, stop in (
        ("source", made.source, rows.count),
        ("owner", made.owner, made.count),
    ):
        if value is not None and bool(((value < -1) | (value >= stop)).any()):
            refuse(f"{name} beyond its rows", f"{name} holds numbers from 0 to {stop - 1}, or -1")
    taken = made.source.sort(1).values
    if bool(((taken[:, 1:] == taken[:, :-1]) & (taken[:, 1:] >= 0)).any()):
        refuse("source with a row twice", "a row can be the source of one new row")
    if made.owner is not None and made.matrix is None:
        filled = torch.zeros_like(made.source).scatter_add_(
            1, made.owner.clamp_min(0), (made.owner >= 0).long()
        )
        if bool((filled == 0).any()):
            refuse("a new row of no rows", "owner must send at least one row into each new one")


def _said(value: Tensor) -> str:
    return f"of {str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"

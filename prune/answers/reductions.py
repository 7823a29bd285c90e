"""What methods inside the vision encoder returned: counts of rows, and what became of them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NoReturn

import torch

from ..contract import EncoderRows, InEncoder, Reduction
from ..errors import MethodAnswerError
from .answer import said


def check_counts(
    method: InEncoder, counts: object, rows: int, keep: int | None, cuts: int
) -> tuple[int, ...]:
    """What `block_counts` returned for a picture of `rows` that leave in `cuts` steps.

    Raises:
        MethodAnswerError: the rule that is broken, the value, and what to return instead.
    """

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
    return counts  # type: ignore[return-value]


def check_reduction(
    method: InEncoder, rows: EncoderRows, keep: int, made: object, *, values: bool
) -> Reduction:
    """What `reduce` returned for the rows of some pictures.

    Raises:
        MethodAnswerError: the rule that is broken, and the value.
    """
    batch, count = rows.numbers.shape
    refuse = partial(_refuse, method)
    if not isinstance(made, Reduction):
        refuse(type(made).__name__, "it must be a Reduction")
    if made.source.dtype != torch.int64 or made.source.shape != (batch, keep):
        refuse(f"source {said(made.source)}", f"source must be int64 {(batch, keep)}")
    for name, value, shape in (
        ("owner", made.owner, (batch, count)),
        ("weights", made.weights, (batch, count)),
        ("matrix", made.matrix, (batch, keep, count)),
    ):
        if value is not None and value.shape != shape:
            refuse(f"{name} {said(value)}", f"{name} must be {shape}")
    if made.weights is not None and made.owner is None:
        refuse("weights without owner", "owner says which new row each row goes into")
    if values:
        _check_numbers(refuse, rows, made)
    return made


def _refuse(method: InEncoder, what: str, rule: str) -> NoReturn:
    raise MethodAnswerError(f"{method.name}.reduce returned {what}, but {rule}.")


def _check_numbers(
    refuse: Callable[[str, str], NoReturn], rows: EncoderRows, made: Reduction
) -> None:
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

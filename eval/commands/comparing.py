"""What `ask` and `compare` share: methods and budgets as typed, one loaded model, what is said."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence

from ...prune.budget import Budget
from ...prune.errors import BudgetError, MethodFieldError
from ..compare.comparison import Asking, Comparison, compare_cells
from ..models.loading import (
    limit_pixels,
    load,
    load_clip,
    resolve_device,
    split_model_args,
)
from ..models.request import ModelRequest
from ..tasks.protocols import Question
from ..words.flags import in_flags
from ..words.parts import Parts, grid, parse, refuse_without_budget


def cells_of(
    words: Sequence[str], budgets: Sequence[Budget | None], method_args: Sequence[str] = ()
) -> list[Parts]:
    """The dense model, then what was typed, with every budget for what has none of its own.

    Raises:
        UnknownMethodError, MethodFieldError, BudgetError: each says what to type instead.
    """
    parsed = [_parts(word, method_args) for word in words]
    given = [budget for budget in budgets if budget is not None]
    if given and not any(part.open for parts in parsed for part in parts):
        own = "has its own budgets" if len(words) == 1 else "have their own budgets"
        listed = ", ".join(map(str, given))
        raise BudgetError(f"{', '.join(map(repr, words))} {own}: leave {listed} out.")
    refuse_without_budget(parsed, budgets)
    cells = grid(parsed, budgets)
    for part in (part for parts in cells for part in parts):
        _ = part.call  # refuses a budget before anything is loaded
    return cells


def _parts(word: str, method_args: Sequence[str]) -> Parts:
    if method_args and "+" in word:
        raise MethodFieldError(
            f"--method_args says not which part of {word!r} it is for: write the fields into the "
            f"word, e.g. divprune@0.5+fastv:layer=3."
        )
    return parse(":".join([word, *method_args]))


def comparisons(
    asked: Iterable[Question],
    cells: Sequence[Parts],
    wanted: ModelRequest,
    how: Asking,
) -> Iterator[Comparison]:
    """One question after the other, on a model that is loaded once.

    Raises:
        VlmpruneError: no method can run on this model; the reason of the first.
    """
    device = resolve_device(wanted.device, may_shard=True)
    loading, pixels = split_model_args(wanted.model_args)
    model, processor = load(
        wanted.name,
        dtype=wanted.dtype,
        attn_implementation=wanted.attn_implementation,
        device=device,
        **loading,
    )
    if pixels:
        processor = limit_pixels(model, processor, pixels)
    clip = load_clip(wanted.clip, processor, device=device)
    for question in asked:
        compared = compare_cells(model, processor, question, cells, how, clip)
        refusals = [row.refusal for row in compared.rows if row.refusal is not None]
        if len(refusals) == len(compared.rows) - 1:
            raise refusals[0]
        yield compared


def say_what_to_know(compared: Sequence[Comparison]) -> None:
    """Refusals and notes, each once, on stderr."""
    rows = [row for each in compared for row in each.rows]
    refusals = [str(row.refusal) for row in rows if row.refusal is not None]
    lines = [f"not applicable: {in_flags(refusal, budget_flags=True)}" for refusal in refusals]
    lines += [f"note: {note}" for each in compared for note in each.notes]
    sys.stderr.writelines(f"{line}\n" for line in dict.fromkeys(lines))

"""`vlmprune compare`: methods side by side, on one question about one picture or several."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from ...adapters.pictures.canvas import together
from ...prune.budget import Budget
from ...prune.contract import Positions
from ..compare.asked import save_picture
from ..compare.comparison import Comparison
from ..console import stdout
from ..tasks.protocols import Question
from ..words.parts import parse_budgets
from .comparing import ModelFlags, cells_of, comparisons, say_what_to_know


def run(
    *,
    asked: Mapping[str, Question],
    methods: Sequence[str],
    budget: Mapping[str, float],
    budgets: Sequence[str],
    positions: Positions | None,
    save: str | None,
    max_new_tokens: int,
    repeats: int,
    model: ModelFlags,
) -> int:
    """The command; arguments are the flags of `vlmprune compare`. Returns the exit code.

    Args:
        asked: the question about each picture, by what was typed for the picture.
        budget: at most one, for methods without one of their own; or `budgets`, several.
    """
    one = Budget.of(**budget)
    cells = cells_of(methods, parse_budgets(budgets) if budgets else [one])
    console = stdout()
    found: list[Comparison] = []
    made = comparisons(
        asked.values(),
        cells,
        model,
        max_new_tokens=max_new_tokens,
        positions=positions,
        repeats=repeats,
    )
    for image, compared in zip(asked, made, strict=True):
        right = f" (right answer: {compared.right_answer})" if compared.right_answer else ""
        title = f"{model.short_name}, {image}: {compared.question}{right}"
        dataclasses.replace(compared.table(), title=title, notes=None).print(console)
        found.append(compared)
    say_what_to_know(found)
    if save:
        columns = 4 if len(cells) % 4 == 0 else 3
        sheets = [compared.picture(columns) for compared in found]
        save_picture(together(sheets, across=1), save)
    return 0

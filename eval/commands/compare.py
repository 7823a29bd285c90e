"""`vlmprune compare`: methods side by side, on one question about one picture or several."""

from __future__ import annotations

import dataclasses

from ...adapters.pictures.canvas import together
from ...prune.budget import Budget
from ..arguments.compare import CompareRequest
from ..compare.asked import save_picture
from ..compare.comparison import Asking
from ..console import stdout
from ..models.loading import short_name
from ..words.parts import parse_budgets
from .comparing import cells_of, comparisons, say_what_to_know


def run(request: CompareRequest) -> int:
    """The command. Returns the exit code."""
    one = Budget.of(**request.budget)
    budgets = parse_budgets(request.budgets) if request.budgets else [one]
    cells = cells_of(request.methods, budgets)
    how = Asking(
        max_new_tokens=request.max_new_tokens, positions=request.positions, repeats=request.repeats
    )
    console, found = stdout(), []
    made = comparisons(request.asked.values(), cells, request.model, how)
    for image, compared in zip(request.asked, made, strict=True):
        right = f" (right answer: {compared.right_answer})" if compared.right_answer else ""
        title = f"{short_name(request.model.name)}, {image}: {compared.question}{right}"
        dataclasses.replace(compared.table(), title=title, notes=None).print(console)
        found.append(compared)
    say_what_to_know(found)
    if request.save:
        columns = 4 if len(cells) % 4 == 0 else 3
        sheets = [compared.picture(columns) for compared in found]
        save_picture(together(sheets, across=1), request.save)
    return 0

"""Sweep a model that is loaded, in a notebook say, with a method written there."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from ..prune.contract import Positions
from .embedded import MODELS
from .embedded.task import EmbeddedTask
from .measure.evaluate import Evaluator
from .models.loading import short_name
from .results.frame import Results
from .results.store import Store
from .sweep.request import SweepRequest
from .sweep.running import sweep_grid
from .tasks.protocols import Task
from .tasks.questions import asked
from .words.parts import combined

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..adapters.clip_text import ClipText

_PICTURE_SIDE = 448


def sweep_model(
    model: PreTrainedModel,
    processor: Any,
    methods: Sequence[str],
    budgets: Sequence[str | float],
    *,
    task: Task | None = None,
    kinds: Sequence[str] | None = None,
    limit: int | None = None,
    batch_size: int = 16,
    seed: int = 0,
    positions: Positions | None = None,
    clip: ClipText | None = None,
    output_path: str | PathLike[str] | None = None,
    rerun: bool = False,
) -> Results:
    """What `vlmprune sweep` does, of a loaded model: the dense one, then methods x budgets.

    Args:
        methods: words as on the command line, e.g. "fastv:layer=3" or "divprune@0.5+fastv".
        budgets: as on the command line: 0.25, 64, "avg:64", "published".
        task: the benchmark; the one that ships with the package by default. Your own questions:
            `JsonlTask("my.jsonl")` of `vlmprune.eval.tasks.jsonl`.
        kinds: only questions of these kinds.
        limit: so many questions; all by default.
        positions, clip: as `vlmprune.patch` takes them.
        output_path: a folder to keep the results in; what is there already is not run again, and
            stderr says when it was measured. A method that was edited since is another one.
        rerun: run everything, also what is there.

    Returns:
        the records of this grid: a list, for the tables, plots and reports, with `to_frame()` for
        pandas.
    """
    request = SweepRequest(
        methods=methods,
        budgets=budgets,
        positions=positions,
        limit=limit,
        kinds=kinds or (),
        batch_size=batch_size,
        seed=seed,
        output_path=Path(output_path) if output_path else None,
        rerun=rerun,
    )
    combinations = combined(request.methods, request.budget_words, seed)
    task = task or EmbeddedTask()
    questions = asked(task, limit, kinds)
    evaluator = Evaluator(
        model, processor, task, questions, batch_size=batch_size, seed=seed, clip=clip
    )
    with TemporaryDirectory() as elsewhere:
        store = Store(request.output_path or Path(elsewhere))
        cells, summary = sweep_grid(
            model, [evaluator], combinations, request, name=_name(model), store=store
        )
        for line in summary.skipped_lines():
            sys.stderr.write(f"{line} (again: rerun=True)\n")
        wanted = {cell.config.id for cell in cells}
        return Results(record for record in store.read() if record["id"] in wanted)


def _name(model: PreTrainedModel) -> str:
    """How results call the model: as the command line does where it would load the same."""
    path = str(model.config.name_or_path or type(model).__name__)
    ships = {str(folder): name for name, folder in MODELS.items()}
    return ships.get(path) or short_name(path)

"""Sweep a model that is loaded already: in a notebook, with a method that was written there."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from ..prune.contract import Positions
from .compose import grid, parse, parse_budgets
from .console import progress
from .embedded import MODEL_DIR
from .environment import hardware, versions
from .evaluate import Evaluator
from .loading import EMBEDDED, fingerprint, short_name
from .results import Config, Measured, Record, Store, method_record
from .sweep import Cell, sweep
from .task import EmbeddedTask, Task

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..adapters.clip_text import ClipText


def sweep_model(
    model: PreTrainedModel,
    processor: Any,
    methods: Sequence[str],
    budgets: Sequence[str | float],
    *,
    task: Task | None = None,
    limit: int | None = None,
    batch_size: int = 16,
    seed: int = 0,
    positions: Positions | None = None,
    clip: ClipText | None = None,
    output_path: str | PathLike[str] | None = None,
) -> list[Record]:
    """What `vlmprune sweep` does, of a loaded model: the dense one, then methods x budgets.

    Args:
        methods: words as on the command line, e.g. "fastv:layer=3" or "divprune@0.5+fastv".
        budgets: as on the command line: 0.25, 64, "avg:64", "published".
        task: the benchmark; the one that ships with the package by default.
        limit: questions of it; all by default.
        positions, clip: as `vlmprune.patch` takes them.
        output_path: a folder to keep the results in; what is there already is not run again.

    Returns:
        the records of this grid, for `table.sweep_table`, `plot.draw` and the reports.
    """
    combinations = grid(
        [parse(text, seed) for text in methods if text != "dense"],
        parse_budgets([str(word) for word in budgets]),
    )
    task = task or EmbeddedTask()
    evaluator = Evaluator(
        model,
        processor,
        task,
        task.questions(limit),
        batch_size=batch_size,
        seed=seed,
        clip=clip,
    )
    base = Config(
        model=_name(model),
        fingerprint=fingerprint(model),
        methods=(),
        positions=None,
        task=task.name,
        task_version=task.version,
        limit=limit,
        seed=seed,
        max_new_tokens=task.max_new_tokens,
        dtype=str(model.dtype).removeprefix("torch."),
        attn_implementation=model.config._attn_implementation,
    )
    cells = [
        Cell(
            dataclasses.replace(
                base,
                methods=tuple(map(method_record, parts)),
                positions=positions if parts else None,
            ),
            parts,
        )
        for parts in combinations
    ]
    with TemporaryDirectory() as folder, progress() as bar:
        store = Store(Path(output_path or folder))
        answered = bar.add_task("starting", total=evaluator.count * len(cells))

        def run(cell: Cell) -> Measured:
            bar.update(answered, description=str(cell))
            measured, _ = evaluator.run(
                cell.calls,
                positions=positions if cell.parts else None,
                progress=lambda questions: bar.advance(answered, questions),
            )
            return measured

        sweep(
            cells,
            run,
            store,
            batch_size=batch_size,
            versions=versions(),
            hardware=hardware(evaluator.device),
        )
        wanted = {cell.config.id for cell in cells}
        return [record for record in store.read() if record["id"] in wanted]


def _name(model: PreTrainedModel) -> str:
    """How results call the model: as the command line does where it would load the same."""
    path = str(model.config.name_or_path or type(model).__name__)
    return EMBEDDED if path == str(MODEL_DIR) else short_name(path)

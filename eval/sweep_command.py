"""`vlmprune sweep`: load, run the grid, then the table and the frontier."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from ..prune.contract import Positions
from .compose import Parts, grid, parse, parse_budgets
from .console import progress, stdout
from .environment import hardware, versions
from .evaluate import Evaluator, Sample
from .loading import fingerprint, load, load_clip, resolve_device, short_name
from .plot import frontier
from .results import Config, Measured, Store, method_record, setting_of
from .sweep import Cell, Summary, sweep
from .table import sweep_table
from .task import EmbeddedTask, Question, Task, asked


def run(
    *,
    methods: Sequence[str],
    budgets: Sequence[str],
    positions: Positions | None,
    limit: int | None,
    batch_size: int,
    seed: int,
    output_path: str,
    log_samples: bool,
    model_name: str,
    device: str | None,
    dtype: str,
    attn_implementation: str | None,
    kinds: Sequence[str] | None = None,
    clip: str | None = None,
    task: Task | None = None,
) -> int:
    """The command; arguments are the flags of `vlmprune sweep`. Returns the exit code."""
    combinations = grid(
        [parse(text, seed) for text in methods if text != "dense"], parse_budgets(budgets)
    )
    task = task or EmbeddedTask()
    questions = asked(task, limit, kinds)
    folder = Path(output_path)
    store = Store(folder)
    device = resolve_device(device)
    model, processor = load(
        model_name, dtype=dtype, attn_implementation=attn_implementation, device=device
    )
    evaluator = Evaluator(
        model,
        processor,
        task,
        questions,
        batch_size=batch_size,
        seed=seed,
        clip=load_clip(clip, processor, device=device),
    )
    base = Config(
        model=short_name(model_name),
        fingerprint=fingerprint(model),
        methods=(),
        positions=None,
        task=task.name,
        task_version=task.version,
        limit=limit,
        seed=seed,
        max_new_tokens=task.max_new_tokens,
        dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
        attn_implementation=model.config._attn_implementation,
        kinds=tuple(sorted(set(kinds))) if kinds else None,
    )
    cells = [_cell(base, parts, positions) for parts in combinations]

    with progress() as bar:
        answered = bar.add_task("starting", total=len(cells) * len(questions))

        def run_cell(cell: Cell) -> Measured:
            measured, samples = evaluator.run(
                cell.calls,
                positions=positions if cell.parts else None,
                progress=lambda n: bar.advance(answered, n),
            )
            if log_samples:
                _write_samples(folder / "samples" / f"{cell.config.id}.jsonl", questions, samples)
            return measured

        def begin(cell: Cell) -> None:
            done = cells.index(cell) * len(questions)
            bar.update(answered, description=str(cell), completed=done)

        try:
            summary = sweep(
                cells,
                run_cell,
                store,
                batch_size=batch_size,
                versions=versions(),
                hardware=hardware(device),
                on_cell=begin,
            )
        except KeyboardInterrupt:
            bar.stop()
            sys.stderr.write(
                f"interrupted: finished cells are in {store.path}, the same command goes on there\n"
            )
            return 130
    report(store, base)
    _say_what_happened(summary, folder)
    return 1 if summary.failed else 0


def report(store: Store, base: Config) -> None:
    """Table to stdout and `table.md`, frontier to `frontier.png`: all cells of this setting."""
    records = [r for r in store.read() if setting_of(r) == base.setting]
    table = sweep_table(records)
    table.print(stdout())
    folder = store.path.parent
    (folder / "table.md").write_text(table.markdown() + "\n", encoding="utf-8")
    frontier(records, folder / "frontier.png")


def _cell(base: Config, parts: Parts, positions: Positions | None) -> Cell:
    records = tuple(map(method_record, parts))
    positions = positions if parts else None
    return Cell(dataclasses.replace(base, methods=records, positions=positions), parts)


def _write_samples(path: Path, questions: Sequence[Question], samples: Sequence[Sample]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8") as file:
        for question, sample in zip(questions, samples, strict=True):
            line = {
                "id": question.id,
                "kind": question.kind,
                "question": question.question,
                "answer": question.answer,
                "prediction": sample.prediction,
                "right": sample.right,
                "kept": sample.kept,
            }
            file.write(json.dumps(line) + "\n")


def _say_what_happened(summary: Summary, folder: Path) -> None:
    counts = {
        "run": len(summary.ok),
        "already there": len(summary.skipped),
        "not applicable": len(summary.not_applicable),
        "failed": len(summary.failed),
    }
    for what, cells in (("not applicable", summary.not_applicable), ("failed", summary.failed)):
        for cell, reason in cells:
            sys.stderr.write(f"{what}: {cell}: {' '.join(reason.split())}\n")
    said = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
    sys.stderr.write(f"cells: {said or 'none'}; results in {folder}\n")

"""`vlmprune sweep`: load once, run the grid on every task, then the tables and the frontiers."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from ..adapters.registry import family_of
from ..prune.contract import ClipText as ClipTextSignal
from ..prune.contract import Positions
from ..prune.errors import MethodFieldError
from .compose import Part, Parts, grid, parse, parse_budgets
from .config import write_config
from .console import progress, stdout
from .environment import hardware, versions
from .evaluate import Benchmark, Evaluator, Sample
from .loading import (
    fingerprint,
    limit_pixels,
    load,
    load_clip,
    resolve_device,
    short_name,
    split_model_args,
)
from .plot import frontier
from .processes import Processes
from .results import Config, Measured, Store, method_record, setting_of
from .sweep import REFUSALS, Cell, Summary, sweep
from .table import averages_table, sweep_table
from .task import EmbeddedTask, Task, asked

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..adapters.clip_text import ClipText

_PICTURE_SIDE = 448


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
    tasks: Sequence[str] = (),
    include_path: str | None = None,
    model_args: Mapping[str, object] | None = None,
    task: Task | None = None,
    settings: Mapping[str, object] | None = None,
) -> int:
    """The command; arguments are the flags of `vlmprune sweep`. Returns the exit code.

    Args:
        task: a task that is not known by a name, in place of `tasks`.
        settings: all flags, as they are written to `sweep.yaml` beside the results.
    """
    combinations = grid(
        [parse(text, seed) for text in methods if text != "dense"], parse_budgets(budgets)
    )
    loading, pixels = split_model_args(model_args or {})
    with Processes.started(cpu=device == "cpu") as processes:
        folder = Path(output_path)
        store = Store(folder) if processes.first else None
        if store is not None and settings is not None:
            named = {} if task else {"tasks": list(tasks) or [EmbeddedTask().name]}
            write_config(folder, {**settings, **named})
        device = resolve_device(device or processes.device, may_shard=processes.world == 1)
        model, processor = load(
            model_name,
            dtype=dtype,
            attn_implementation=attn_implementation,
            device=device,
            **loading,
        )
        found = _benchmarks(
            [task] if task else tasks or [EmbeddedTask().name],
            model,
            processor,
            kinds=kinds,
            include_path=include_path,
            limit=limit,
            batch_size=batch_size,
            seed=seed,
            clip=load_clip(clip, processor, device=device)
            if clip and _reads_clip(combinations, model)
            else None,
            processes=processes,
            pixels=pixels,
        )
        base = Config(
            model=short_name(model_name),
            fingerprint=fingerprint(model),
            methods=(),
            positions=None,
            task="",
            task_version="",
            limit=limit,
            seed=seed,
            max_new_tokens=0,
            dtype=str(model.dtype).removeprefix("torch."),
            attn_implementation=model.config._attn_implementation,
            kinds=tuple(sorted(set(kinds))) if kinds else None,
            model_args=dict(model_args) if model_args else None,
        )
        bases = [
            dataclasses.replace(
                base,
                task=benchmark.name,
                task_version=benchmark.version,
                max_new_tokens=benchmark.max_new_tokens,
            )
            for benchmark in found
        ]
        cells = [_cell(of_task, parts, positions) for of_task in bases for parts in combinations]
        benchmark_of = {benchmark.name: benchmark for benchmark in found}
        counts = [benchmark_of[cell.config.task].count for cell in cells]

        with progress(shown=processes.first) as bar:
            answered = bar.add_task("starting", total=sum(counts))

            def run_cell(cell: Cell) -> Measured:
                def save_picture(picture: Image.Image, number: int) -> str:
                    return _save_picture(picture, folder, f"pictures/{cell.config.id}/{number}.jpg")

                measured, samples = benchmark_of[cell.config.task].run(
                    cell.calls,
                    positions=positions if cell.parts else None,
                    progress=lambda n: bar.advance(answered, n),
                    save_picture=save_picture,
                )
                if log_samples and processes.first:
                    _write_samples(folder / "samples" / f"{cell.config.id}.jsonl", samples)
                return measured

            def begin(cell: Cell) -> None:
                text = f"{cell.config.task}: {cell}" if len(found) > 1 else str(cell)
                bar.update(answered, description=text, completed=sum(counts[: cells.index(cell)]))

            try:
                summary = sweep(
                    cells,
                    run_cell,
                    store,
                    batch_size=batch_size,
                    versions=versions(),
                    hardware=hardware(device)
                    | ({"processes": processes.world} if processes.world > 1 else {}),
                    on_cell=begin,
                    processes=processes,
                )
            except KeyboardInterrupt:
                bar.stop()
                sys.stderr.write(
                    f"interrupted: finished cells are in {folder}, the same command goes on there\n"
                )
                return 130
        if store is not None:
            report(store, bases)
            _say_what_happened(summary, folder)
        return 1 if summary.failed else 0


def report(store: Store, bases: Sequence[Config]) -> None:
    """Tables to stdout and `table.md`, frontiers to PNG: all cells of these settings."""
    folder, console = store.path.parent, stdout()
    records = store.read()
    texts = []
    for base in bases:
        of_task = [r for r in records if setting_of(r) == base.setting]
        table = sweep_table(of_task)
        table.print(console)
        texts.append(table.markdown())
        name = "frontier.png" if len(bases) == 1 else f"frontier_{base.task}.png"
        frontier(of_task, folder / name)
    if len(bases) > 1:
        settings = {base.setting for base in bases}
        table = averages_table([r for r in records if setting_of(r) in settings])
        table.print(console)
        texts.append(table.markdown())
    (folder / "table.md").write_text("\n\n".join(texts) + "\n", encoding="utf-8")


def _benchmarks(
    tasks: Sequence[str | Task],
    model: PreTrainedModel,
    processor: Any,
    *,
    kinds: Sequence[str] | None,
    include_path: str | None,
    limit: int | None,
    batch_size: int,
    seed: int,
    clip: ClipText | None,
    processes: Processes,
    pixels: Mapping[str, int],
) -> list[Benchmark]:
    """Each task once: the embedded benchmark as it is, all others through lmms-eval."""
    embedded = EmbeddedTask()
    found: list[Benchmark] = []
    for name in dict.fromkeys(tasks):
        if not isinstance(name, str) or name == embedded.name:
            task = embedded if isinstance(name, str) else name
            questions = asked(task, limit, kinds)
            found.append(
                Evaluator(
                    model,
                    limit_pixels(model, processor, pixels) if pixels else processor,
                    task,
                    questions,
                    batch_size=batch_size,
                    seed=seed,
                    clip=clip,
                    processes=processes,
                )
            )
            continue
        if kinds:
            raise MethodFieldError(
                f"--kinds {' '.join(kinds)}: only {embedded.name} has kinds of questions, not "
                f"{name}: leave one of them out."
            )
        from .lmms.benchmark import benchmarks

        found += benchmarks(
            [name],
            model,
            processor,
            include_path=include_path,
            limit=limit,
            batch_size=batch_size,
            seed=seed,
            clip=clip,
            processes=processes,
            pixels=pixels,
        )
    return found


def _reads_clip(combinations: Sequence[Parts], model: PreTrainedModel) -> bool:
    """Whether a method compares the image with the question in CLIP's space."""
    shape = family_of(model).shape(model)

    def reads(part: Part) -> bool:
        try:
            return any(isinstance(need, ClipTextSignal) for need in part.method.needs(shape))
        except REFUSALS:  # the cell will say so
            return False

    return any(reads(part) for parts in combinations for part in parts)


def _cell(base: Config, parts: Parts, positions: Positions | None) -> Cell:
    records = tuple(map(method_record, parts))
    positions = positions if parts else None
    return Cell(dataclasses.replace(base, methods=records, positions=positions), parts)


def _save_picture(picture: Image.Image, folder: Path, name: str) -> str:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    smaller = picture.convert("RGB")
    smaller.thumbnail((4 * _PICTURE_SIDE, _PICTURE_SIDE))  # panels of an image stand side by side
    smaller.save(path, quality=85)
    return name


def _write_samples(path: Path, samples: Sequence[Sample]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8") as file:
        for sample in samples:
            file.write(json.dumps(sample.as_json()) + "\n")


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

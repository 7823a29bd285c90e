"""Sweep a model that is loaded: for the command, and in a notebook with a method written there."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from io import BytesIO
from os import PathLike
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from PIL import Image

from ..adapters.devices import input_device
from ..prune.contract import Positions
from ..prune.errors import MethodFieldError
from .console import progress
from .embedded import MODEL_DIR
from .environment import hardware, versions
from .extras import Extras
from .measure.evaluate import Benchmark, Evaluator, Sample
from .models.loading import EMBEDDED, fingerprint, short_name
from .processes import Processes
from .results.records import Config, Measured, Results, Store, method_record
from .sweep.grid import Cell, Summary, sweep
from .tasks.task import EmbeddedTask, Task, asked
from .words import Parts, combined

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
        the records of this grid: a list, for `table.sweep_table`, `plot.draw` and the reports, with
        `to_frame()` for pandas.
    """
    for given, named in ((methods, "methods"), (budgets, "budgets")):
        if isinstance(given, str) or not isinstance(given, Iterable):
            raise MethodFieldError(f"{named}={given!r} is no list: write {named}=[{given!r}].")
    for word in methods:
        if not isinstance(word, str):
            raise MethodFieldError(
                f"{word!r} is no word: register the class, and write its name, e.g. 'fastv'."
            )
    combinations = combined(methods, [str(word) for word in budgets], seed)
    task = task or EmbeddedTask()
    evaluator = Evaluator(
        model,
        processor,
        task,
        asked(task, limit, kinds),
        batch_size=batch_size,
        seed=seed,
        clip=clip,
    )
    with TemporaryDirectory() as elsewhere:
        folder = Path(output_path or elsewhere)
        store = Store(folder)
        cells, summary = sweep_grid(
            model,
            [evaluator],
            combinations,
            name=_name(model),
            limit=limit,
            seed=seed,
            batch_size=batch_size,
            positions=positions,
            store=store,
            kinds=kinds,
            pictures=folder if output_path else None,
            rerun=rerun,
        )
        for line in summary.skipped_lines():
            sys.stderr.write(f"{line} (again: rerun=True)\n")
        wanted = {cell.config.id for cell in cells}
        return Results(record for record in store.read() if record["id"] in wanted)


def sweep_grid(
    model: PreTrainedModel,
    benchmarks: Sequence[Benchmark],
    combinations: Sequence[Parts],
    *,
    name: str,
    limit: int | None,
    seed: int,
    batch_size: int,
    positions: Positions | None,
    store: Store | None,
    kinds: Sequence[str] | None = None,
    model_args: Mapping[str, object] | None = None,
    pictures: Path | None = None,
    samples: Path | None = None,
    processes: Processes | None = None,
    rerun: bool = False,
    given: Callable[[Config], Mapping[str, object]] | None = None,
) -> tuple[list[Cell], Summary]:
    """Every combination on every benchmark, under a progress bar.

    Args:
        name: what results call the model.
        limit, seed, kinds, model_args: what they were made with, for the cells' configurations.
        store: None in all processes but the first.
        pictures: the folder of the result file, for pictures of what was kept; None: none.
        samples: a folder for all answers; None: they are not written.
        rerun: run all cells, also those that the store holds.
        given: flags of the command that a cell's configuration does not tell.
    """
    processes = processes or Processes()
    extras = Extras()
    base = Config(
        model=name,
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
    cells = [
        _cell(base, benchmark, parts, positions)
        for benchmark in benchmarks
        for parts in combinations
    ]
    benchmark_of = {benchmark.name: benchmark for benchmark in benchmarks}
    counts = [benchmark_of[cell.config.task].count for cell in cells]

    with progress(shown=processes.first) as bar:
        answered = bar.add_task("starting", total=sum(counts))

        def run(cell: Cell) -> Measured:
            save_picture = (
                partial(_save_picture, extras, pictures, cell.config.id) if pictures else None
            )
            measured, answers = benchmark_of[cell.config.task].run(
                cell.calls,
                positions=positions if cell.parts else None,
                progress=lambda n: bar.advance(answered, n),
                save_picture=save_picture,
            )
            if samples and processes.first:
                _write_samples(extras, samples / f"{cell.config.id}.jsonl", answers)
            return measured

        def begin(cell: Cell) -> None:
            text = f"{cell.config.task}: {cell}" if len(benchmarks) > 1 else str(cell)
            bar.update(answered, description=text, completed=sum(counts[: cells.index(cell)]))

        shared = {"processes": processes.world} if processes.world > 1 else {}
        summary = sweep(
            cells,
            run,
            store,
            batch_size=batch_size,
            versions=versions(),
            hardware=hardware(input_device(model)) | shared,
            on_cell=begin,
            processes=processes,
            rerun=rerun,
            given=given,
        )
    return cells, summary


def _cell(base: Config, benchmark: Benchmark, parts: Parts, positions: Positions | None) -> Cell:
    config = dataclasses.replace(
        base,
        methods=tuple(map(method_record, parts)),
        positions=positions if parts else None,
        task=benchmark.name,
        task_version=benchmark.version,
        max_new_tokens=benchmark.max_new_tokens,
    )
    return Cell(config, parts)


def _save_picture(
    extras: Extras, folder: Path, cell: str, picture: Image.Image, number: int
) -> str | None:
    name = f"pictures/{cell}/{number}.jpg"
    smaller = picture.convert("RGB")
    smaller.thumbnail((4 * _PICTURE_SIDE, _PICTURE_SIDE))  # panels of an image stand side by side
    encoded = BytesIO()
    smaller.save(encoded, format="jpeg", quality=85)
    return name if extras.write("pictures", folder / name, encoded.getvalue()) else None


def _write_samples(extras: Extras, path: Path, samples: Sequence[Sample]) -> None:
    lines = [json.dumps(sample.as_json()) + "\n" for sample in samples]
    extras.write("samples", path, "".join(lines).encode())


def _name(model: PreTrainedModel) -> str:
    """How results call the model: as the command line does where it would load the same."""
    path = str(model.config.name_or_path or type(model).__name__)
    return EMBEDDED if path == str(MODEL_DIR) else short_name(path)

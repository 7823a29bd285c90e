"""Run a grid on loaded benchmarks, under a progress bar: cells, pictures, answers."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image
from rich.progress import Progress

from ...adapters.devices import input_device
from ...prune.contract import Positions
from ..console import progress
from ..environment import hardware, versions
from ..extras import Extras
from ..measure.evaluate import Benchmark, Sample
from ..models.loading import fingerprint
from ..processes import Processes
from ..results.agreement import digest
from ..results.records import Config, Measured, MeasuredClasses, method_record
from ..results.store import Store
from ..words.parts import Parts
from .grid import Cell, Summary, sweep
from .request import GridRequest, SweepRequest

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

_PICTURE_SIDE = 448


def sweep_grid(
    model: PreTrainedModel,
    benchmarks: Sequence[Benchmark],
    combinations: Sequence[Parts],
    request: SweepRequest,
    *,
    name: str,
    store: Store | None,
    processes: Processes | None = None,
    given: Callable[[Config], Mapping[str, object]] | None = None,
) -> tuple[list[Cell], Summary]:
    """Every combination on every benchmark of questions; see `run_grid`.

    Args:
        name: what results call the model.
    """
    return run_grid(
        _base(model, request, name),
        benchmarks,
        combinations,
        request,
        device=input_device(model),
        store=store,
        processes=processes,
        given=given,
    )


def run_grid(
    base: Config,
    benchmarks: Sequence[Benchmark],
    combinations: Sequence[Parts],
    request: GridRequest,
    *,
    device: torch.device,
    store: Store | None,
    processes: Processes | None = None,
    given: Callable[[Config], Mapping[str, object]] | None = None,
) -> tuple[list[Cell], Summary]:
    """Every combination on every benchmark, under a progress bar.

    Args:
        base: what the configurations of all cells share.
        request: what `benchmarks` and `combinations` were made of; pictures and answers go to its
            folder, if it has one.
        device: where the model takes its inputs.
        store: None in all processes but the first.
        given: flags of the command that a cell's configuration does not tell.
    """
    processes = processes or Processes()
    cells = [
        _cell(base, benchmark, parts, request.positions)
        for benchmark in benchmarks
        for parts in combinations
    ]
    with progress(shown=processes.first) as bar:
        grid = _Grid(request, {each.name: each for each in benchmarks}, cells, processes, bar)
        shared = {"processes": processes.world} if processes.world > 1 else {}
        summary = sweep(
            cells,
            grid.run,
            store,
            batch_size=request.batch_size,
            versions=versions(),
            hardware=hardware(device) | shared,
            on_cell=grid.begin,
            processes=processes,
            rerun=request.rerun,
            given=given,
        )
    return cells, summary


class _Grid:
    """Runs a cell on its benchmark, moves the bar, and writes what lies beside the results."""

    def __init__(
        self,
        request: GridRequest,
        benchmarks: Mapping[str, Benchmark],
        cells: Sequence[Cell],
        processes: Processes,
        bar: Progress,
    ) -> None:
        self.request = request
        self.benchmarks = benchmarks
        self.cells = cells
        self.processes = processes
        self.bar = bar
        self.extras = Extras()
        self.counts = [benchmarks[cell.config.task].count for cell in cells]
        self.answered = bar.add_task("starting", total=sum(self.counts))

    def begin(self, cell: Cell) -> None:
        several = len(self.benchmarks) > 1
        done = sum(self.counts[: self.cells.index(cell)])
        text = f"{cell.config.task}: {cell}" if several else str(cell)
        self.bar.update(self.answered, description=text, completed=done)

    def run(self, cell: Cell) -> Measured | MeasuredClasses:
        request, folder = self.request, self.request.output_path
        measured, answers = self.benchmarks[cell.config.task].run(
            cell.calls,
            positions=request.positions if cell.parts else None,
            progress=partial(self.bar.advance, self.answered),
            save_picture=partial(_save_picture, self.extras, folder, cell.config.id)
            if folder
            else None,
        )
        measured["answers"] = [digest(answer.prediction) for answer in answers]
        if request.samples and self.processes.first:
            path = request.samples / f"{cell.config.id}.jsonl"
            _write_samples(self.extras, path, answers)
        return measured


def _base(model: PreTrainedModel, request: SweepRequest, name: str) -> Config:
    """What all cells share."""
    return Config(
        model=name,
        fingerprint=fingerprint(model),
        methods=(),
        positions=None,
        task="",
        task_version="",
        limit=request.limit,
        seed=request.seed,
        max_new_tokens=0,
        dtype=str(model.dtype).removeprefix("torch."),
        attn_implementation=model.config._attn_implementation,
        kinds=tuple(sorted(set(request.kinds))) or None,
        model_args=(dict(request.model.model_args) or None) if request.model else None,
    )


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

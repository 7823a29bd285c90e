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

from ...adapters.devices import input_device
from ...prune.contract import Positions
from ..console import progress
from ..environment import hardware, versions
from ..extras import Extras
from ..measure.evaluate import Benchmark, Sample
from ..models.loading import fingerprint
from ..processes import Processes
from ..results.records import Config, Measured, method_record
from ..results.store import Store
from ..words.parts import Parts
from .grid import Cell, Summary, sweep
from .request import SweepRequest

if TYPE_CHECKING:
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
    """Every combination on every benchmark, under a progress bar.

    Args:
        request: what `benchmarks` and `combinations` were made of; pictures and answers go to its
            folder, if it has one.
        name: what results call the model.
        store: None in all processes but the first.
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
        limit=request.limit,
        seed=request.seed,
        max_new_tokens=0,
        dtype=str(model.dtype).removeprefix("torch."),
        attn_implementation=model.config._attn_implementation,
        kinds=tuple(sorted(set(request.kinds))) or None,
        model_args=dict(request.model.model_args) or None if request.model else None,
    )
    cells = [
        _cell(base, benchmark, parts, request.positions)
        for benchmark in benchmarks
        for parts in combinations
    ]
    benchmark_of = {benchmark.name: benchmark for benchmark in benchmarks}
    counts = [benchmark_of[cell.config.task].count for cell in cells]

    with progress(shown=processes.first) as bar:
        answered = bar.add_task("starting", total=sum(counts))

        def run(cell: Cell) -> Measured:
            save_picture = (
                partial(_save_picture, extras, request.output_path, cell.config.id)
                if request.output_path
                else None
            )
            measured, answers = benchmark_of[cell.config.task].run(
                cell.calls,
                positions=request.positions if cell.parts else None,
                progress=lambda n: bar.advance(answered, n),
                save_picture=save_picture,
            )
            if request.samples and processes.first:
                _write_samples(extras, request.samples / f"{cell.config.id}.jsonl", answers)
            return measured

        def begin(cell: Cell) -> None:
            text = f"{cell.config.task}: {cell}" if len(benchmarks) > 1 else str(cell)
            bar.update(answered, description=text, completed=sum(counts[: cells.index(cell)]))

        shared = {"processes": processes.world} if processes.world > 1 else {}
        summary = sweep(
            cells,
            run,
            store,
            batch_size=request.batch_size,
            versions=versions(),
            hardware=hardware(input_device(model)) | shared,
            on_cell=begin,
            processes=processes,
            rerun=request.rerun,
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

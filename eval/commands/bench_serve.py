"""`vlmprune bench serve`: requests a second and waiting times under load, dense beside patched."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from ..arguments.bench_serve import BenchServeRequest
from ..bench.report_file import write_report
from ..bench.rounds import twin
from ..bench.serve import Load, UnderLoad, serve
from ..bench.serve_table import serve_table
from ..bench.subject import Subject, dtype_on
from ..bench.variant import Variant
from ..console import progress, stdout
from ..environment import hardware, load_average, versions
from ..models.loading import resolve_device
from ..words.parts import grid, parse, parse_budgets
from ..words.typed import DENSE

SCHEMA = 1


def run(request: BenchServeRequest) -> int:
    """The command. Returns the exit code."""
    device = resolve_device(request.device)
    words = [parse(text) for text in request.methods if text != DENSE]
    reports: list[dict[str, Any]] = []
    shapes: Sequence[str | None] = request.shapes or [None]
    for shape in shapes:
        subject = _subject(request, device, shape)
        variants = [Variant(parts) for parts in grid(words, parse_budgets(request.budgets))]
        rows = [UnderLoad(v, clients) for clients in request.concurrency for v in variants]
        reports.append({})

        def save(subject: Subject = subject, rows: Sequence[UnderLoad] = rows) -> None:
            """What there is so far, also in the file."""
            reports[-1] = {
                "schema": SCHEMA,
                "model": subject.as_json(),
                "rounds": max(len(row.loads) for row in rows),
                "new_tokens": request.new_tokens,
                "load_average": load_average(),
                "hardware": hardware(device),
                "versions": versions(),
                "rows": [row.as_json() for row in rows if row.loads],
            }
            if request.output_path:
                write_report(reports[0] if len(reports) == 1 else reports, request.output_path)

        _measure(request, subject, rows, device, save)
    serve_table(reports).print(stdout())
    return 0


def _subject(request: BenchServeRequest, device: str, shape: str | None) -> Subject:
    return Subject(
        shape=shape,
        model_name=request.model,
        picture=request.picture,
        layers=request.layers,
        width=request.width,
        visual_tokens=request.tokens,
        dtype=dtype_on(device, request.dtype),
        attn_implementation=request.attn_implementation,
    )


def _measure(
    request: BenchServeRequest,
    subject: Subject,
    rows: Sequence[UnderLoad],
    device: str,
    save: Callable[[], object],
) -> None:
    """Round after round, each saved when it is done; the first rows of a number of clients are the
    dense model's."""
    model = subject.model(device)
    patched, inputs = twin(model), subject.inputs(device)
    clip = subject.text_twin(device, tuple(part for row in rows for part in row.variant.parts))
    ask = partial(serve, patched, inputs, new_tokens=request.new_tokens)
    with progress() as bar:
        rounds = bar.add_task("bench", total=(request.repeats + 1) * len(rows))
        for row in rows:  # which warms up
            with row.variant.patched(patched, clip):
                ask(clients=1, requests=1)
            bar.advance(rounds)
        for _ in range(request.repeats):
            dense: Load | None = None
            for row in rows:
                with row.variant.patched(patched, clip):
                    load = ask(clients=row.clients, requests=request.requests)
                dense = load if dense is None or not row.variant.parts else dense
                row.loads.append(load)
                row.dense.append(dense)
                bar.advance(rounds)
            save()

"""`vlmprune bench serve`: requests a second and waiting times under load, dense beside pruned."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

from ..arguments.bench_serve import BenchServeRequest
from ..bench.load import Load, Round, UnderLoad
from ..bench.report_file import write_report
from ..bench.serve_table import serve_table
from ..bench.subject import Subject, dtype_on
from ..console import progress, stdout
from ..environment import hardware, load_average, versions
from ..models.loading import resolve_device
from ..words.parts import Parts, combined
from ..words.typed import DENSE

SCHEMA = 2


def run(request: BenchServeRequest) -> int:
    """The command. Returns the exit code."""
    device = resolve_device(request.device)
    cells = combined([word for word in request.methods if word != DENSE], request.budgets, seed=0)
    reports: list[dict[str, Any]] = []
    shapes: Sequence[str | None] = request.shapes or [None]
    for shape in shapes:
        subject = _subject(request, device, shape)
        rows = [UnderLoad(parts, clients) for clients in request.concurrency for parts in cells]
        reports.append({})

        def save(subject: Subject = subject, rows: Sequence[UnderLoad] = rows) -> None:
            """What there is so far, also in the file."""
            reports[-1] = {
                "schema": SCHEMA,
                "engine": request.engine,
                "engine_args": request.engine_args,
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

        with _served(request, subject, device, cells) as round_of:
            _measure(request, round_of, rows, save)
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


def _served(
    request: BenchServeRequest, subject: Subject, device: str, cells: Sequence[Parts]
) -> AbstractContextManager[Round]:
    if request.engine == "vllm":
        from ..bench.vllm_load import of_vllm

        return of_vllm(
            subject,
            device,
            cells,
            request.new_tokens,
            most_clients=max(request.concurrency),
            engine_args=request.engine_args,
        )
    from ..bench.serve import of_transformers  # patches, which is not for vLLM's environment

    return of_transformers(subject, device, cells, request.new_tokens)


def _measure(
    request: BenchServeRequest,
    round_of: Round,
    rows: Sequence[UnderLoad],
    save: Callable[[], object],
) -> None:
    """Round after round, each saved when it is done; the first rows of a number of clients are the
    dense model's."""
    with progress() as bar:
        rounds = bar.add_task("bench", total=(request.repeats + 1) * len(rows))
        for row in rows:  # which warms up
            round_of(row.parts, 1, 1)
            bar.advance(rounds)
        for _ in range(request.repeats):
            dense: Load | None = None
            for row in rows:
                load = round_of(row.parts, row.clients, request.requests)
                dense = load if dense is None or not row.parts else dense
                row.loads.append(load)
                row.dense.append(dense)
                bar.advance(rounds)
            save()

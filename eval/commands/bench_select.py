"""`vlmprune bench select`: the time of choosing, beside a plain transcription of official code."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from typing import Any

import torch

from ...prune.contract import BeforeLLM, Place
from ...prune.errors import MethodFieldError
from ...prune.registry import default_methods, method_class
from ..arguments.bench_select import BenchSelectRequest
from ..bench.report_file import write_report
from ..bench.select import GRIDS, PATCHES, Scene, compare
from ..bench.select_table import select_table
from ..console import progress, stdout
from ..environment import hardware, load_average, versions

SCHEMA = 1


def run(request: BenchSelectRequest) -> int:
    """The command. Returns the exit code."""
    chosen = [_before_llm(name) for name in request.methods or all_before_llm()]
    for count in request.tokens:
        if count % PATCHES or count // PATCHES not in GRIDS:
            possible = ", ".join(str(tiles * PATCHES) for tiles in GRIDS)
            raise MethodFieldError(f"--tokens {count} is not possible: use some of {possible}.")
    report: dict[str, Any] = {
        "schema": SCHEMA,
        "width": request.width,
        "rounds": request.rounds,
        "load_average": load_average(),
        "rows": [],
    }
    sizes = list(product(request.tokens, request.batches))
    with _threads(request.threads), progress() as bar:
        measured = bar.add_task("bench", total=(request.rounds + 1) * len(chosen) * len(sizes))
        report |= {"hardware": hardware("cpu"), "versions": versions()}
        for count, batch in sizes:
            scene = Scene.random(tiles=count // PATCHES, images=batch, width=request.width)
            rows = compare(scene, chosen, request.rounds, lambda: bar.advance(measured))
            report["rows"] += [row.as_json() for row in rows]
            if request.output_path:  # what is measured is kept, whatever happens later
                write_report(report, request.output_path)
    select_table(report).print(stdout())
    return 0


def all_before_llm() -> list[str]:
    """Names of the methods that choose before the LLM."""
    return [name for name, made in default_methods()[0].items() if made.place is Place.BEFORE_LLM]


def _before_llm(name: str) -> BeforeLLM:
    cls = method_class(name)
    if not issubclass(cls, BeforeLLM):
        raise MethodFieldError(
            f"{name} acts {cls.place.value}, where choosing is a part of the forward: use "
            f"`vlmprune bench model`. Here go: {', '.join(all_before_llm())}."
        )
    return cls()


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)

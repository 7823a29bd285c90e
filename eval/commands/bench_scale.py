"""`vlmprune bench scale`: how time and memory of choosing grow with the number of visual tokens."""

from __future__ import annotations

import math
from typing import Any

from ...prune.contract import Place
from ...prune.errors import MethodFieldError
from ...prune.registry import default_methods, method_class
from ..arguments.bench_scale import BenchScaleRequest
from ..bench.report_file import write_report
from ..bench.scale import FRAME, SHARE, Layout, fits, measured
from ..bench.scale_table import scale_table
from ..console import progress, stdout
from ..environment import hardware, load_average, versions

SCHEMA = 1


def run(request: BenchScaleRequest) -> int:
    """The command. Returns the exit code."""
    for count in request.tokens:
        if math.isqrt(count) ** 2 != count or count % FRAME**2:
            raise MethodFieldError(
                f"--tokens {count} must be a square and a multiple of {FRAME**2}, e.g. "
                f"256,1024,4096,16384."
            )
    inside = [name for name in request.methods if method_class(name).place is Place.ENCODER]
    if inside:
        raise MethodFieldError(
            f"{', '.join(inside)} chooses block by block inside the vision encoder, whose time "
            f"`vlmprune bench model --methods {inside[0]} --picture HxW` measures, several "
            f"pictures in one run."
        )
    found = default_methods()[0].items()
    every = [name for name, made in found if made.place is not Place.ENCODER]
    names = list(request.methods) or every
    cases = [(name, layout) for name in names for layout in _layouts(name)]
    report: dict[str, Any] = {
        "schema": SCHEMA,
        "rounds": request.rounds,
        "share": 1 / SHARE,
        "load_average": load_average(),
        "hardware": hardware("cpu"),
        "versions": versions(),
        "rows": [],
    }
    with progress() as bar:
        done = bar.add_task("bench", total=len(cases) * len(request.tokens))
        for name, layout in cases:
            sizes: list[dict[str, Any]] = []
            row: dict[str, Any] = {"method": name, "layout": layout, "sizes": sizes}
            report["rows"].append(row)
            for count in sorted(request.tokens):
                sizes.append(measured(name, layout, count, request.rounds, request.limit, sizes))
                row |= fits(sizes)
                if request.output_path:  # what is measured is kept, whatever happens later
                    write_report(report, request.output_path)
                bar.advance(done)
    scale_table(report).print(stdout())
    return 0


def _layouts(name: str) -> tuple[Layout, ...]:
    return ("grid", "frames") if method_class(name).place is Place.BEFORE_LLM else ("decoder",)

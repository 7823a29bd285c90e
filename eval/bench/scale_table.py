"""The report of `vlmprune bench scale` as a table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from operator import itemgetter
from typing import Any

from ..environment import describe
from ..results.statistics import Spread
from ..table import Table
from .scale import DECODER_WIDTH, FIT_FROM, FRAME, LAYERS, LONG, SHARE, WIDTH, Fit

_WORDS = {"grid": "one grid", "frames": f"frames of {FRAME**2}", "decoder": "in the decoder"}


def scale_table(report: Mapping[str, Any]) -> Table:
    """The report of one run, as written to the result file."""
    counts = sorted({size["tokens"] for row in report["rows"] for size in row["sizes"]})

    def cells(row: Mapping[str, Any]) -> Iterator[str]:
        by_count = {size["tokens"]: size for size in row["sizes"]}
        yield row["method"]
        yield _WORDS[row["layout"]]
        for count in counts:
            yield _ms(by_count[count]["seconds"]) if count in by_count else ""
        yield _fitted(row["time"])
        for count in counts[-2:]:
            yield _mib(by_count[count]["peak_bytes"]) if count in by_count else ""
        yield _fitted(row["memory"])

    return Table(
        headers=(
            "Method",
            "Tokens lie in",
            *(f"ms at {count}" for count in counts),
            "Time as N^ (R2)",
            *(f"MiB at {count}" for count in counts[-2:]),
            "Memory as N^ (R2)",
        ),
        rows=[tuple(cells(row)) for row in sorted(report["rows"], key=itemgetter("method"))],
        numbers_from=2,
        title=(
            f"Choosing one of {SHARE} tokens, float32; medians of {report['rounds']} rounds (of "
            f"more than {LONG:.0f} s, one) on {describe(report['hardware'])}"
        ),
        notes=(
            f"Before the LLM: reading scores from queries and keys of CLIP-L's size, and choosing "
            f"among features of width {WIDTH}; memory is what both add. In the decoder: {LAYERS} "
            f"layers of width {DECODER_WIDTH}; time of choosing with reading, memory of the whole "
            f"prefill. Exponents: least squares of logarithms from {FIT_FROM} tokens on (of two "
            f"points without R2), for memory above 1 MiB. -: left out, as the size before says "
            f"that it would take too long, or too little to fit. Products of all pairs are stored, "
            f"in float32, for up to 8192 tokens; above, rows are computed when they are needed."
        ),
    )


def _ms(value: Spread | None) -> str:
    if value is None:
        return "-"
    ms = 1e3 * value["median"]
    return f"{ms:.0f}" if ms >= 100 else f"{ms:.1f}" if ms >= 10 else f"{ms:.2f}"


def _mib(size: int | None) -> str:
    return "-" if size is None else f"{size / 2**20:.1f}"


def _fitted(found: Fit | None) -> str:
    if found is None:
        return "-"
    exponent = f"{found['exponent']:.1f}".replace("-0.0", "0.0")
    spread = "" if found["r_squared"] is None else f" ({found['r_squared']:.2f})"
    return exponent + spread

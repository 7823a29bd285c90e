"""Reports of `vlmprune bench select` as tables: in full, and a line a method."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..environment import describe
from ..results.statistics import Spread
from ..table import Table

NOTES = (
    "Plain: a transcription of the paper's released code (or of the paper, where none was). Times "
    "of the whole batch, medians; ratios are taken within a round. Both sides start from queries "
    "and keys of encoder layers, the encoder's output and the projected features, and end with the "
    "indices that stay; visionzip, prumerge and prumerge_plus also with merged rows, globalcom2 "
    "with the rows of features. Maps: whole attention maps of the layers that plain code looks at "
    "(it makes the encoder run eager attention and return those of all layers). Without maps: the "
    "ratio if they cost nothing. Read: scores, from queries and keys (ours; in the order of the "
    "tokens) or from maps. Left out on both sides: encoder, projector, packing of features. 576 "
    "tokens: one tile, 192 kept; more: thumbnail and crops, 128 kept a tile, or as many of the "
    "image. -: nothing to compare."
)


def select_table(report: dict[str, Any]) -> Table:
    """The report of one run, as written to the result file."""
    rows: list[tuple[str, ...]] = []
    for row in report["rows"]:
        ours, plain = row["seconds"]["ours"], row["seconds"]["plain"]
        head = (row["method"], str(row["tokens"]), str(row["batch"]), str(row["kept"]))
        numbers = (_ms(ours["read"]), _ms(ours["choose"]), _ms_range(ours["total"]))
        if plain is None:
            rows.append((*head, *numbers, *["-"] * 6))
            continue
        rows.append(
            (
                *head,
                *numbers,
                _ms(plain["maps"]),
                _ms(plain["read"]),
                _ms(plain["choose"]),
                _ms_range(plain["total"]),
                _times(row["plain_over_ours"]),
                _times(row["plain_over_ours_without_maps"]),
            )
        )
    return Table(
        headers=(
            "Method",
            "Tokens",
            "Images",
            "Kept",
            "Read ms",
            "Choose ms",
            "Total ms [quartiles]",
            "Plain maps ms",
            "Plain read ms",
            "Plain choose ms",
            "Plain total ms [quartiles]",
            "Plain/ours [quartiles]",
            "Without maps",
        ),
        rows=rows,
        numbers_from=1,
        droppable=(9, 8, 7, 5, 4, 3, 12),
        title=_title(report),
        notes=NOTES,
    )


def summary_table(report: dict[str, Any]) -> Table:
    """The same in short: a line a method, and for each number of tokens the times of one image and
    the ratios of one and of several."""
    cells = {(r["method"], r["tokens"], r["batch"]): r for r in report["rows"]}
    methods = list(dict.fromkeys(r["method"] for r in report["rows"]))
    sizes = sorted({r["tokens"] for r in report["rows"]})
    batches = sorted({r["batch"] for r in report["rows"]})

    def row(method: str) -> Iterator[str]:
        yield method
        for size in sizes:
            seconds = cells[method, size, batches[0]]["seconds"]
            yield _ms(seconds["ours"]["total"])
            yield _ms(seconds["plain"]["total"]) if seconds["plain"] else "-"
            for batch in batches:
                ratio = cells[method, size, batch]["plain_over_ours"]
                yield f"{ratio['median']:.1f}x" if ratio else "-"

    return Table(
        headers=(
            "Method",
            *(
                f"{size}: {what}"
                for size in sizes
                for what in ("ours ms", "plain ms", *(f"ratio at {batch}" for batch in batches))
            ),
        ),
        rows=[tuple(row(method)) for method in methods],
        numbers_from=1,
        title=_title(report),
        notes=NOTES,
    )


def _title(report: dict[str, Any]) -> str:
    return (
        f"Choosing before the LLM, random inputs of CLIP-L/336 and width {report['width']}, "
        f"float32; {report['rounds']} rounds on {describe(report['hardware'])}"
    )


def _ms(value: Spread) -> str:
    return _short(1e3 * value["median"])


def _ms_range(value: Spread) -> str:
    q1, q3 = (_short(1e3 * value[end]) for end in ("q1", "q3"))
    return f"{_ms(value)} [{q1}, {q3}]"


def _times(value: Spread) -> str:
    return f"{value['median']:.1f}x [{value['q1']:.1f}, {value['q3']:.1f}]"


def _short(value: float) -> str:
    """Three digits, and no more than two behind the point."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"

"""`vlmprune ask`: one question about one picture, dense and pruned, and what was saved; with
several methods, all of them beside each other, as `vlmprune compare` shows them."""

from __future__ import annotations

import dataclasses

from ...adapters.pictures.canvas import LEGEND
from ...prune.budget import Budget
from ..arguments.ask import AskRequest
from ..compare.asked import save_picture
from ..compare.comparison import Asking, Row
from ..console import stdout
from ..image_file import InputError
from ..models.loading import short_name
from ..results.statistics import Spread
from ..results.texts import milliseconds
from ..table import Table
from .comparing import cells_of, comparisons, say_what_to_know

_REPEATS = 5


def run(request: AskRequest) -> int:
    """The command. Returns the exit code."""
    asked, save = request.asked, request.save
    cells = cells_of(request.methods, [Budget.of(**request.budget)], request.method_args)
    how = Asking(
        max_new_tokens=request.max_new_tokens, positions=request.positions, repeats=_REPEATS
    )
    (compared,) = comparisons([asked], cells, request.model, how)
    dense, *pruned = compared.rows
    if len(pruned) == 1:
        table = _table(pruned[0].name, dense, pruned[0])
    else:
        table = dataclasses.replace(compared.table(), title=None, notes=None)
    console = stdout()
    console.print(f"{short_name(request.model.name)}: {asked.question}", markup=False)
    if asked.answer:
        console.print(f"right answer: {asked.answer}", markup=False)
    table.print(console)
    say_what_to_know([compared])
    if save:
        alone = pruned[0].picture if len(pruned) == 1 else None
        picture = alone or compared.picture()
        save_picture(picture, save, picture.info.get(LEGEND, ()))
    return 0


def _table(name: str, dense: Row, pruned: Row) -> Table:
    """One line a quantity: dense, pruned, and the share saved."""
    a, b = dense.measured, pruned.measured
    if a is None or b is None:
        raise InputError("There is nothing to compare.")

    def line(name: str, before: float, after: float, text: str) -> tuple[str, ...]:
        saved = f"{100 * (1 - after / before):.0f} %" if before else ""
        return name, text.format(before), text.format(after), saved

    def times(name: str, before: Spread | None, after: Spread | None) -> list[tuple[str, ...]]:
        if before is None or after is None:
            return []
        return [(f"{name} (ms)", milliseconds(before), milliseconds(after), _saved(before, after))]

    tokens_a, tokens_b = a["tokens"], b["tokens"]
    came, left = tokens_a["in_per_image"], tokens_b.get("cache_per_image")
    return Table(
        headers=("", "dense", name, "saved"),
        rows=[
            ("answer", dense.answer, pruned.answer, ""),
            line("visual tokens", tokens_a["kept_per_image"], tokens_b["kept_per_image"], "{:.0f}"),
            *([] if left is None else [line("visual in cache", came, left, "{:.4g}")]),
            line(
                "average per layer",
                tokens_a["average_per_layer"],
                tokens_b["average_per_layer"],
                "{:.1f}",
            ),
            line(
                "prefill GFLOPs",
                a["flops"]["prefill"] / 1e9,
                b["flops"]["prefill"] / 1e9,
                "{:.3g}",
            ),
            line(
                "GFLOPs with vision",
                a["flops"]["first_token"] / 1e9,
                b["flops"]["first_token"] / 1e9,
                "{:.3g}",
            ),
            line("KV cache (KiB)", a["kv_bytes"] / 1024, b["kv_bytes"] / 1024, "{:.0f}"),
            *times("first token", a["times"]["first_token"], b["times"]["first_token"]),
            *times(
                "each next token", a["times"]["per_decoded_token"], b["times"]["per_decoded_token"]
            ),
        ],
        numbers_from=1,
        notes=f"Times: medians of {_REPEATS}; what is saved of them, and in brackets the least and "
        f"the most that their quartiles allow.",
        wrapping=(1, 2),
    )


def _saved(before: Spread, after: Spread) -> str:
    """The share of a time that is saved, and within which limits: those of the quartiles."""
    if before["n"] < 2 or after["n"] < 2:
        return ""
    pairs = (("median", "median"), ("q3", "q1"), ("q1", "q3"))
    share, low, high = (100 * (1 - after[a] / before[b]) for a, b in pairs)  # type: ignore[literal-required]
    return f"{share:.0f} % ({low:.0f} to {high:.0f})"

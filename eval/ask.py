"""`vlmprune ask`: one question about one picture, dense and pruned, and what was saved; with
several methods, all of them beside each other."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence

from ..prune.budget import Budget
from ..prune.contract import Positions
from ..prune.errors import BudgetError, MethodFieldError
from .compare import Row, compare_cells
from .compose import Parts, parse
from .console import stdout
from .image_file import InputError
from .loading import (
    limit_pixels,
    load,
    load_clip,
    resolve_device,
    short_name,
    split_model_args,
)
from .stats import Spread
from .table import Table, milliseconds
from .task import Question

_REPEATS = 5


def run(
    *,
    asked: Question,
    methods: Sequence[str],
    method_args: Sequence[str],
    budget: dict[str, float],
    positions: Positions | None,
    save: str | None,
    max_new_tokens: int,
    model_name: str,
    device: str | None,
    dtype: str,
    attn_implementation: str | None,
    clip: str | None = None,
    model_args: Mapping[str, object] | None = None,
) -> int:
    """The command; arguments are the flags of `vlmprune ask`. Returns the exit code."""
    if method_args and len(methods) > 1:
        raise MethodFieldError(
            f"--method_args says not which of {', '.join(methods)} it is for: write the fields "
            f"into the word, e.g. fastv:layer=3@0.25."
        )
    cells = _cells(methods, method_args, Budget.of(**budget))
    for part in (part for parts in cells for part in parts):
        _ = part.call  # refuses a budget before anything is loaded
    device = resolve_device(device, may_shard=True)
    loading, pixels = split_model_args(model_args or {})
    model, processor = load(
        model_name, dtype=dtype, attn_implementation=attn_implementation, device=device, **loading
    )
    if pixels:
        processor = limit_pixels(model, processor, pixels)
    compared = compare_cells(
        model,
        processor,
        asked,
        [(), *cells],
        max_new_tokens=max_new_tokens,
        positions=positions,
        clip=load_clip(clip, processor, device=device),
        repeats=_REPEATS,
    )
    dense, *pruned = compared.rows
    refusals = [row.refusal for row in pruned if row.refusal is not None]
    if len(refusals) == len(pruned):
        raise refusals[0]
    if len(pruned) == 1:
        table = _table(pruned[0].name, dense, pruned[0])
    else:
        table = dataclasses.replace(compared.table(), title=None, notes=None)
    console = stdout()
    console.print(f"{short_name(model_name)}: {asked.question}", markup=False)
    if asked.answer:
        console.print(f"right answer: {asked.answer}", markup=False)
    table.print(console)
    for refusal in refusals:
        sys.stderr.write(f"not applicable: {refusal}\n")
    for note in compared.notes:
        sys.stderr.write(f"note: {note}\n")
    if save:
        alone = pruned[0].picture if len(pruned) == 1 else None
        (alone or compared.picture()).save(save)
        sys.stderr.write(f"kept tokens: {save}\n")
    return 0


def _cells(words: Sequence[str], method_args: Sequence[str], budget: Budget | None) -> list[Parts]:
    """What was typed, with `budget` for what has none of its own."""
    cells = [_parts(word, method_args) for word in words]
    if budget is not None and not any(part.open for parts in cells for part in parts):
        own = "has its own budgets" if len(words) == 1 else "have their own budgets"
        raise BudgetError(f"{', '.join(map(repr, words))} {own}: leave {budget} out.")
    return [_with_budget(parts, budget) for parts in cells]


def _parts(word: str, method_args: Sequence[str]) -> Parts:
    if method_args and "+" in word:
        raise MethodFieldError(
            f"--method_args says not which part of {word!r} it is for: write the fields into the "
            f"word, e.g. divprune@0.5+fastv:layer=3."
        )
    return parse(":".join([word, *method_args]))


def _with_budget(parts: Parts, budget: Budget | None) -> Parts:
    found = tuple(part.at(budget) for part in parts)
    for part in found:
        if part.budget is None and part.method.needs_budget:
            name = part.method.name
            raise BudgetError(
                f"{name} needs a budget: give one of --keep_ratio 0.25, --keep_tokens 64, "
                f"--average_tokens 128 or --flops_ratio 0.3, or write it behind the method, "
                f"{name}@0.25."
            )
    return found


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
    return Table(
        headers=("", "dense", name, "saved"),
        rows=[
            ("answer", dense.answer, pruned.answer, ""),
            line("visual tokens", tokens_a["kept_per_image"], tokens_b["kept_per_image"], "{:.0f}"),
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

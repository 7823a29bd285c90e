"""What methods on the KV cache returned: entries that stay, are attended to, or leave."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..contract import Attending, CacheEntries, Compressed, Compressing
from .answer import Answer, refuse, said


def check_compressed(
    method: Compressing, entries: CacheEntries, keep: int, given: object, values: bool
) -> Compressed:
    """What `compress` returned for the S entries of a layer.

    Raises:
        MethodAnswerError: the rule that is broken, the value, and what to return instead.
    """
    what = f"Compressed(kept=...) with the {keep} numbers of entries, sorted, (K,) or (H_kv, K)"
    if not isinstance(given, Compressed):
        refuse(method, "compress", said(given), "it must be a Compressed", what)
    answer = Answer(method, "compress", what)
    heads, stored, width = entries.keys.shape
    kept = answer.integers("kept", given.kept)
    if kept.dim() not in (1, 2) or (kept.dim() == 2 and len(kept) != heads):
        answer.refuse(f"kept {said(kept)}", f"kept must be (K,) or ({heads}, K)")
    if kept.shape[-1] != keep:
        answer.refuse(
            f"{kept.shape[-1]} entries for a count of {keep}", "it must keep exactly that"
        )
    for field, merged in (("keys", given.keys), ("values", given.values)):
        fits = isinstance(merged, Tensor) and merged.is_floating_point()
        if merged is not None and not (fits and merged.shape == (heads, keep, width)):
            answer.refuse(
                f"{field} {said(merged)}", f"{field} must be ({heads}, {keep}, {width}) floats"
            )
    answer.scores(given.scores, [(stored,), (heads, stored)])
    if values:
        answer.ascending("kept", kept, stored, "entries")
    return given


def check_attended(
    method: Attending,
    keys: Tensor,
    valid: Tensor | None,
    keep: Tensor | None,
    given: Any,
    values: bool,
) -> tuple[Tensor, Tensor | None] | None:
    """What `attended` returned for keys (B, H_kv, S, D_head) and a budget (B,) on the CPU.

    Raises:
        MethodAnswerError: the rule that is broken, the value, and what to return instead.
    """
    batch, stored = len(keys), keys.shape[2]
    what = f"columns ({batch}, K) and which of them count, or None for all {stored} entries"
    answer = Answer(method, "attended", what)
    budgets = None if keep is None else [min(n, stored) for n in keep.tolist()]
    if given is None:
        if budgets is not None and valid is None and min(budgets) < stored:
            answer.refuse("None", f"all {stored} entries are more than {min(budgets)}")
        return None
    if not isinstance(given, tuple) or len(given) != 2:
        answer.refuse(said(given), "it must be a pair")
    columns, counts = given
    answer.integers("columns", columns)
    if columns.dim() != 2 or len(columns) != batch or not 1 <= columns.shape[1] <= stored:
        answer.refuse(f"columns {said(columns)}", f"columns must be ({batch}, 1 to {stored})")
    if counts is None and valid is None and budgets is not None:
        wrong = next((n for n in budgets if n != columns.shape[1]), None)
        if wrong is not None:
            answer.refuse(f"{columns.shape[1]} entries", f"the budget of a row is {wrong}")
    if counts is not None and (
        not isinstance(counts, Tensor)
        or counts.dtype != torch.bool
        or counts.shape != columns.shape
    ):
        answer.refuse(
            f"{said(counts)} for which of them count", f"it must be {tuple(columns.shape)} bools"
        )
    if values:
        _check_columns(answer, columns, counts, valid, budgets, stored)
    return columns, counts


def check_evicted(method: Compressing, slot: object, stored: int) -> int | None:
    """What `evict` returned where a row holds `stored` entries.

    Raises:
        MethodAnswerError: it is neither None nor the number of an entry.
    """
    whole = isinstance(slot, int) and not isinstance(slot, bool)
    if slot is not None and not (whole and 0 <= slot < stored):  # type: ignore[operator]
        refuse(
            method,
            "evict",
            repr(slot),
            f"it must be the number of an entry, 0 to {stored - 1}",
            "it as an int, or None to remove none",
        )
    return slot  # type: ignore[return-value]


def _check_columns(
    answer: Answer,
    columns: Tensor,
    counts: Tensor | None,
    valid: Tensor | None,
    budgets: list[int] | None,
    stored: int,
) -> None:
    answer.within("columns", columns, stored, "entries")
    for row, own in enumerate(columns):
        own = own if counts is None else own[counts[row]]
        answer.ascending("columns", own, stored, "entries")
        entries = stored
        if valid is not None:
            entries = int(valid[row].sum())
            if not bool(valid[row][own].all()):
                answer.refuse("columns of padding", "padding may not count")
        if budgets is not None and len(own) != min(budgets[row], entries):
            answer.refuse(
                f"{len(own)} entries of row {row}",
                f"its budget is {budgets[row]} of {entries} entries",
            )

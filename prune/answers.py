"""What a method returned is checked here, whatever its kind, before anything is done with it.

Types, shapes and counts are known to the host and are always checked. Numbers in a tensor are not:
on a GPU, to look at them is to wait for all work before. They are checked (`values`) of methods
that are not shipped, and of all where `patch(..., debug=True)` asks for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from .contract import (
    Attending,
    CacheEntries,
    Choosing,
    ClsFeatures,
    Compressed,
    Compressing,
    EncoderFeatures,
    Features,
    Hidden,
    Method,
    Place,
    Selection,
    Signal,
    VisualTokens,
)
from .errors import MethodAnswerError
from .registry import is_shipped

Asked = tuple[VisualTokens, int | None]


def looks_at_values(method: Method, debug: bool) -> bool:
    """Whether numbers in the method's tensors are checked too, for which the host waits."""
    return debug or not is_shipped(type(method))


def check_batch(
    method: Choosing, asked: Sequence[Asked], answers: object, *, values: bool
) -> list[Selection]:
    """What `select_batch` returned.

    Raises:
        MethodAnswerError: the rule that is broken, the value, and what to return instead.
    """
    own = type(method).select_batch is not Choosing.select_batch
    call = "select_batch" if own else "select"
    if not isinstance(answers, list | tuple) or len(answers) != len(asked):
        many = f"{len(answers)} answers" if isinstance(answers, list | tuple) else _said(answers)
        _refuse(
            method, call, many, f"it must answer all {len(asked)} questions, in order", "a list"
        )
    return [
        check_selection(method, call, tokens, keep, answer, values=values)
        for (tokens, keep), answer in zip(asked, answers, strict=True)
    ]


def check_selection(
    method: Choosing, call: str, tokens: VisualTokens, keep: int | None, given: object, values: bool
) -> Selection:
    """What `select` or (`keep` None) `select_adaptive` returned for some tokens.

    Raises:
        MethodAnswerError: the rule that is broken, the value, and what to return instead.
    """
    what = f"Selection(kept=...) with the {keep or 'chosen'} numbers, sorted"
    if not isinstance(given, Selection):
        _refuse(method, call, _said(given), "it must be a Selection", what)
    answer = _Answer(method, call, what)
    kept = answer.numbers("kept", given.kept)
    if given.order is not None:
        answer.numbers("order", given.order)
    rows = given.count
    if keep is not None and rows != keep:
        field = "kept" if given.order is None else "order"
        answer.refuse(f"{rows} tokens ({field}) for a count of {keep}", "it must keep exactly that")
    if keep is None:
        least, most = _bounds(method, tokens)
        if not least <= rows <= most:
            answer.refuse(
                f"{rows} of {tokens.num_tokens} tokens",
                f"it must keep {least} to {most} of them (see `most`)",
            )
    if len(kept) > rows or (len(kept) < rows and given.features is None):
        answer.refuse(
            f"an order of {rows} rows and {len(kept)} kept tokens",
            "order must hold every kept token once, and -1 only for rows with features of their "
            "own",
        )
    _check_features(answer, tokens, given)
    answer.scores(given.scores, [(tokens.num_tokens,)])
    if given.groups is not None:
        answer.integers("groups", given.groups)
        if given.groups.dim() != 2 or len(given.groups) != 2:
            answer.refuse(f"groups {_said(given.groups)}", "groups must be (2, G) pairs")
    if values:
        _check_numbers(answer, tokens, given)
    return given


def check_compressed(
    method: Compressing, entries: CacheEntries, keep: int, given: object, values: bool
) -> Compressed:
    """What `compress` returned for the S entries of a layer.

    Raises:
        MethodAnswerError: the rule that is broken, the value, and what to return instead.
    """
    what = f"Compressed(kept=...) with the {keep} numbers of entries, sorted, (K,) or (H_kv, K)"
    if not isinstance(given, Compressed):
        _refuse(method, "compress", _said(given), "it must be a Compressed", what)
    answer = _Answer(method, "compress", what)
    heads, stored, width = entries.keys.shape
    kept = answer.integers("kept", given.kept)
    if kept.dim() not in (1, 2) or (kept.dim() == 2 and len(kept) != heads):
        answer.refuse(f"kept {_said(kept)}", f"kept must be (K,) or ({heads}, K)")
    if kept.shape[-1] != keep:
        answer.refuse(
            f"{kept.shape[-1]} entries for a count of {keep}", "it must keep exactly that"
        )
    for field, merged in (("keys", given.keys), ("values", given.values)):
        fits = isinstance(merged, Tensor) and merged.is_floating_point()
        if merged is not None and not (fits and merged.shape == (heads, keep, width)):
            answer.refuse(
                f"{field} {_said(merged)}", f"{field} must be ({heads}, {keep}, {width}) floats"
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
    answer = _Answer(method, "attended", what)
    budgets = None if keep is None else [min(n, stored) for n in keep.tolist()]
    if given is None:
        if budgets is not None and valid is None and min(budgets) < stored:
            answer.refuse("None", f"all {stored} entries are more than {min(budgets)}")
        return None
    if not isinstance(given, tuple) or len(given) != 2:
        answer.refuse(_said(given), "it must be a pair")
    columns, counts = given
    answer.integers("columns", columns)
    if columns.dim() != 2 or len(columns) != batch or not 1 <= columns.shape[1] <= stored:
        answer.refuse(f"columns {_said(columns)}", f"columns must be ({batch}, 1 to {stored})")
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
            f"{_said(counts)} for which of them count", f"it must be {tuple(columns.shape)} bools"
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
        _refuse(
            method,
            "evict",
            repr(slot),
            f"it must be the number of an entry, 0 to {stored - 1}",
            "it as an int, or None to remove none",
        )
    return slot  # type: ignore[return-value]


def check_read(signal: Signal, given: object, count: int) -> Tensor:
    """What the `read` of a declared signal returned: a number for each of `count` tokens.

    Raises:
        MethodAnswerError: it returned something else.
    """
    if not isinstance(given, Tensor) or given.shape != (count,):
        raise MethodAnswerError(
            f"The read function of {type(signal).__name__} returned {_said(given)}: it must be one "
            f"number for each of the {count} tokens that it is given, a tensor ({count},)."
        )
    return given


def asked_rows(columns: Tensor, given: object) -> Tensor:
    """Those of the text `columns` (T,) that a rule for rows asks, by what it returned.

    Raises:
        MethodAnswerError: it returned something else than (T,) bools, or asks none.
    """
    count = len(columns)
    if not isinstance(given, Tensor) or given.dtype != torch.bool or given.shape != (count,):
        raise MethodAnswerError(
            f"A rule for rows returned {_said(given)}: it must tell of each of the {count} text "
            f"tokens whether it is asked, a bool tensor ({count},)."
        )
    asked = columns[given]
    if not len(asked):
        raise MethodAnswerError(
            f"A rule for rows asks none of the {count} text tokens: it must ask at least one."
        )
    return asked


class _Answer:
    """An answer that is looked at: who gave it, in which call, what it should have been."""

    def __init__(self, method: Method, call: str, instead: str) -> None:
        self.method, self.call, self.instead = method, call, instead

    def refuse(self, value: str, rule: str) -> NoReturn:
        _refuse(self.method, self.call, value, rule, self.instead)

    def integers(self, field: str, given: object) -> Tensor:
        if not isinstance(given, Tensor) or given.dtype != torch.int64:
            self.refuse(f"{field} {_said(given)}", f"{field} must be a tensor of int64")
        return given

    def numbers(self, field: str, given: object) -> Tensor:
        tensor = self.integers(field, given)
        if tensor.dim() != 1:
            self.refuse(f"{field} {_said(tensor)}", f"{field} must have one dimension")
        return tensor

    def scores(self, given: object, shapes: Sequence[tuple[int, ...]]) -> None:
        floats = isinstance(given, Tensor) and given.is_floating_point()
        if given is not None and not (floats and given.shape in shapes):  # type: ignore[attr-defined]
            self.refuse(
                f"scores {_said(given)}",
                f"scores must be {' or '.join(map(str, shapes))} floats, one for each it was given",
            )

    def within(self, field: str, numbers: Tensor, stop: int, what: str) -> None:
        wrong = numbers[(numbers < 0) | (numbers >= stop)]
        if len(wrong):
            self.refuse(f"{field} with {int(wrong[0])}", f"{what} are numbered 0 to {stop - 1}")

    def ascending(self, field: str, numbers: Tensor, stop: int, what: str) -> None:
        """Numbers (..., K) of `stop` things, each once, in order."""
        self.within(field, numbers, stop, what)
        one, two = numbers[..., :-1], numbers[..., 1:]
        if (same := one[one == two]).numel():
            self.refuse(f"{field} with {int(same[0])} twice", "each number may be there once")
        if (wrong := one > two).any():
            pair = f"{int(one[wrong][0])} before {int(two[wrong][0])}"
            self.refuse(f"{field} with {pair}", "numbers must ascend: sort them")


def _check_features(answer: _Answer, tokens: VisualTokens, given: Selection) -> None:
    """(R, C) or (R, D) floats for R rows, as wide as the features that the method has seen."""
    features, rows = given.features, given.rows
    if features is None:
        if rows is not None:
            answer.refuse("rows without features", "rows say which rows `features` holds")
        return
    if rows is not None:
        answer.numbers("rows", rows)
    count = given.count if rows is None else len(rows)
    floats = isinstance(features, Tensor) and features.is_floating_point()
    width, what = _width(tokens, given.projected)
    if not floats or features.dim() != 2 or len(features) != count:
        answer.refuse(
            f"features {_said(features)}",
            f"features must be floats, one row for each of the {count} rows that "
            f"{'enter' if rows is None else '`rows` names'}",
        )
    if width is None:
        answer.refuse(
            f"features {_said(features)} for the projector to read",
            "features of the encoder are made of EncoderFeatures or ClsFeatures, which `needs` "
            "does not declare (projected=True says that they are the LLM's)",
        )
    if features.shape[1] != width:
        answer.refuse(f"features {_said(features)}", f"{what} have width {width}")


def _width(tokens: VisualTokens, projected: bool) -> tuple[int | None, str]:
    """How wide features are that stand for these tokens; None: the method has not seen any."""
    seen: tuple[type[Signal], ...]
    inside = tokens.place is Place.DECODER
    if inside:
        seen, what = (Hidden,), "hidden states"
    elif projected:
        seen, what = (Features,), "LLM features (projected=True)"
    else:
        seen, what = (EncoderFeatures, ClsFeatures), "encoder features (projected=False)"
    found = (tensor.shape[-1] for signal, tensor in tokens.signals.items() if type(signal) in seen)
    width = next(found, None)
    if width is None and (inside or projected):
        width = tokens.shape.decoder.hidden_size
    return width, what


def _check_numbers(answer: _Answer, tokens: VisualTokens, given: Selection) -> None:
    kept, rows = given.kept, given.count
    answer.ascending("kept", kept, tokens.num_tokens, "tokens")
    if given.order is not None:
        held = given.order[given.order != -1].sort().values
        if not torch.equal(held, kept):
            answer.refuse(
                f"order {_numbers(given.order)} of kept {_numbers(kept)}",
                "order must hold every kept token once, and -1 for rows that stand for none",
            )
    own = torch.arange(rows, device=kept.device)
    if given.rows is not None:
        answer.within("rows", given.rows, rows, "rows")
        if len(given.rows.unique()) != len(given.rows):
            answer.refuse(f"rows {_numbers(given.rows)}", "each row may be there once")
        own = given.rows
    if given.order is not None:
        bare = own.new_zeros(rows).index_fill(0, own, 1) == 0
        bare = bare & (given.order.to(bare.device) < 0)
        if bare.any():
            answer.refuse(
                f"row {int(bare.nonzero()[0])} with neither token nor features",
                "a row that stands for no token brings features of its own",
            )
    if given.groups is not None:
        answer.within("groups[0]", given.groups[0], rows, "rows")
        answer.within("groups[1]", given.groups[1], tokens.num_tokens, "tokens")
        if (given.groups[0].diff() < 0).any():
            answer.refuse(
                f"groups of rows {_numbers(given.groups[0])}", "groups must be sorted by row"
            )


def _bounds(method: Choosing, tokens: VisualTokens) -> tuple[int, int]:
    """The fewest and the most that may stay where the method decides: at a cut that is adaptive
    under a budget as well none may, and all."""
    cuts = method.cuts(tokens.shape)
    if any(cut.adaptive and cut.depth == tokens.depth for cut in cuts):
        return 0, tokens.num_tokens
    return method.least, min(tokens.num_tokens, method.most(tokens.num_tokens))


def _check_columns(
    answer: _Answer,
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


def _refuse(method: Method, call: str, value: str, rule: str, instead: str) -> NoReturn:
    raise MethodAnswerError(f"{method.name}.{call} returned {value}, but {rule}. Return {instead}.")


def _said(value: object) -> str:
    """A value in a few words: a tensor by its dtype and shape, others as they are printed."""
    if isinstance(value, Tensor):
        return f"of {str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"


def _numbers(tensor: Tensor) -> str:
    listed = tensor.tolist()
    return str(listed) if len(listed) <= 12 else f"[{str(listed[:12])[1:-1]}, ...]"

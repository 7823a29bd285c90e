"""What methods that choose returned: the tokens of an image that stay."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..contract import (
    Choosing,
    ClsFeatures,
    EncoderFeatures,
    Features,
    Hidden,
    Place,
    Selection,
    Signal,
    VisualTokens,
)
from .answer import Answer, listed, refuse, said

Asked = tuple[VisualTokens, int | None]


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
        many = f"{len(answers)} answers" if isinstance(answers, list | tuple) else said(answers)
        refuse(method, call, many, f"it must answer all {len(asked)} questions, in order", "a list")
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
        refuse(method, call, said(given), "it must be a Selection", what)
    answer = Answer(method, call, what)
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
            answer.refuse(f"groups {said(given.groups)}", "groups must be (2, G) pairs")
    if values:
        _check_numbers(answer, tokens, given)
    return given


def _check_features(answer: Answer, tokens: VisualTokens, given: Selection) -> None:
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
            f"features {said(features)}",
            f"features must be floats, one row for each of the {count} rows that "
            f"{'enter' if rows is None else '`rows` names'}",
        )
    if width is None:
        answer.refuse(
            f"features {said(features)} for the projector to read",
            "features of the encoder are made of EncoderFeatures or ClsFeatures, which `needs` "
            "does not declare (projected=True says that they are the LLM's)",
        )
    if features.shape[1] != width:
        answer.refuse(f"features {said(features)}", f"{what} have width {width}")


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


def _check_numbers(answer: Answer, tokens: VisualTokens, given: Selection) -> None:
    kept, rows = given.kept, given.count
    answer.ascending("kept", kept, tokens.num_tokens, "tokens")
    if given.order is not None:
        held = given.order[given.order != -1].sort().values
        if not torch.equal(held, kept):
            answer.refuse(
                f"order {listed(given.order)} of kept {listed(kept)}",
                "order must hold every kept token once, and -1 for rows that stand for none",
            )
    own = torch.arange(rows, device=kept.device)
    if given.rows is not None:
        answer.within("rows", given.rows, rows, "rows")
        if len(given.rows.unique()) != len(given.rows):
            answer.refuse(f"rows {listed(given.rows)}", "each row may be there once")
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
                f"groups of rows {listed(given.groups[0])}", "groups must be sorted by row"
            )


def _bounds(method: Choosing, tokens: VisualTokens) -> tuple[int, int]:
    """The fewest and the most that may stay where the method decides: at a cut that is adaptive
    under a budget as well none may, and all."""
    cuts = method.cuts(tokens.shape)
    if any(cut.adaptive and cut.depth == tokens.depth for cut in cuts):
        return 0, tokens.num_tokens
    return method.least, min(tokens.num_tokens, method.most(tokens.num_tokens))

"""From what a handle reports to what the oracle must be told: the cuts of a `Truth`."""

from __future__ import annotations

import torch
import vlmprune
import zoo
from oracle import Rows, Truth

TOLERANCE = {"atol": 1e-4, "rtol": 1e-4}
"""Peaky random weights amplify rounding: the two orders of operations differ by about 1e-5."""


def features_of(model, inputs: dict) -> list[torch.Tensor]:
    """Features of each image as the model's public encoder functions give them: (N, D)."""
    return [row.embeds[image] for row in Truth(model, inputs).rows for image in row.images]


def rows_that_enter(case: zoo.Case, inputs: dict, model, handle) -> list[Rows]:
    """Of each image, the rows that a method before the LLM lets in: their tokens as the handle
    reports them, their embeddings from the encoder functions of the patched model.

    Rows that were not merged must be their tokens' features on the unpatched model.
    """
    last, found = handle.last, []
    dense = features_of(case.reference(model.config._attn_implementation), inputs)
    for i, given in enumerate(features_of(model, inputs)):
        order, merged = _entered(last, i)
        embeds = given[Rows(order).slots(len(given))]
        own = (order >= 0) & ~torch.isin(torch.arange(len(embeds)), merged)
        torch.testing.assert_close(embeds[own], dense[i][order[own]], **TOLERANCE)
        found.append(Rows(order, embeds))
    return found


def truth_of(case: zoo.Case, inputs: dict, model, handle) -> Truth:
    """What a patched model must compute of the inputs that it saw last."""
    last, reference = handle.last, case.reference("eager")
    rows = [torch.arange(n) for n in last.tokens_in]  # the token of each row alive, -1 for none
    cuts: list = []
    positions: list[str] = []
    for stage in last.stages:
        if stage.layer:
            truth = Truth(reference, inputs, cuts, positions)
            kept = [_kept(truth, last, stage, i, tokens) for i, tokens in enumerate(rows)]
        elif any(x is not None for x in (*last.order, *last.groups)):
            kept = rows_that_enter(case, inputs, *_before_llm(case, inputs, model, handle))
        else:
            kept = stage.kept
        rows = [_tokens_of(*pair) for pair in zip(rows, kept, strict=True)]
        cuts = [*cuts, (stage.layer, kept)]
        # As it was before stages said so: decoder cuts left positions as they were.
        word = last.positions if stage.layer == 0 else "original"
        positions = [*positions, getattr(stage, "positions", word)]
    return Truth(reference, inputs, cuts, positions)


def _said(stage, name: str, i: int):
    """What a stage says of an image under a name; None where it says nothing."""
    said = getattr(stage, name, None)
    return said[i] if said else None


def _entered(last, i: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens of the rows of an image that entered the LLM, -1 for none; which were merged."""
    first, order, pairs = None, last.order[i], last.members[i]
    if last.stages and last.stages[0].layer == 0:
        first = last.stages[0]
        if getattr(first, "order", None):
            order, pairs = first.order[i], first.groups[i]
    if order is None:
        order = last.kept[i] if first is None else first.kept[i]
    return order, order[:0] if pairs is None else pairs[0]


def _before_llm(case: zoo.Case, inputs: dict, model, handle):
    """The model and its handle; of the first method alone, where the handle no longer says what
    entered the LLM."""
    first = handle.last.stages[0]
    if getattr(first, "order", None) or len(handle.last.stages) == 1:
        return model, handle
    model = case.model(model.config._attn_implementation)
    handle = vlmprune.patch(model, handle.methods[0])
    with torch.no_grad():
        model(**inputs)
    return model, handle


def _tokens_of(tokens: torch.Tensor, kept: torch.Tensor | Rows) -> torch.Tensor:
    """The tokens of the rows behind a cut, given those of the rows before it."""
    if not isinstance(kept, Rows):
        return kept
    none = torch.cat([tokens, torch.tensor([-1])])
    return none[kept.order]


def _kept(truth: Truth, last, stage, i: int, tokens: torch.Tensor) -> torch.Tensor | Rows:
    """What a cut in the decoder keeps of an image, whose rows before it are `tokens` or -1."""
    order, pairs = _said(stage, "order", i), _said(stage, "groups", i)
    if order is None:
        order = torch.isin(tokens, stage.kept[i]).nonzero()[:, 0]
        if pairs is None and bool((tokens.diff(prepend=torch.tensor([-1])) > 0).all()):
            return stage.kept[i]  # no row was ever moved or merged
        if bool((tokens < 0).any()):
            order = _with_others(truth, last, stage, i, tokens, order)
    if pairs is None:
        return Rows(order)
    return Rows(order, members=[pairs[1, pairs[0] == row] for row in range(len(order))])


def _with_others(truth: Truth, last, stage, i: int, tokens, order) -> torch.Tensor:
    """Of rows that are no token nothing is reported: as many stay as the count says, those that the
    last token reads most."""
    entered = [s.keep for s in last.plans[i] if s.layer <= stage.layer]
    count = entered[-1] if entered else last.tokens_in[i]
    scores = [s for b in range(len(truth.rows)) for s in truth.last_row(b, stage.layer - 1)][i]
    others = scores.masked_fill(tokens >= 0, -1).topk(count - len(order)).indices
    return torch.cat([order, others]).sort().values

"""Selections of an image's parts as one: tokens renumbered, rows put together and rearranged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import reduce

import torch
from torch import Tensor

from .contract import Selection


def renumbered(selection: Selection, numbers: Tensor, total: int) -> Selection:
    """Token i becomes token `numbers[i]` of `total`; ascending numbers stay ascending."""
    order, groups, scores = selection.order, selection.groups, selection.scores
    if order is not None:
        order = torch.where(order >= 0, numbers[order.clamp_min(0)], -1)
    if groups is not None:
        groups = torch.stack([groups[0], numbers[groups[1]]])
    if scores is not None:
        scores = scores.new_full((total,), torch.nan).index_copy(0, numbers, scores)
    kept = numbers[selection.kept]
    return replace(selection, kept=kept, order=order, groups=groups, scores=scores)


def joined(parts: Sequence[Selection]) -> Selection:
    """Selections of one image's parts as one: part after part if any of them has an order of its
    own, else in raster order. Features of rows that no part gave stay those of their tokens."""
    kept, arranged = torch.cat([part.kept for part in parts]).sort()
    order, place = None, arranged.argsort()  # where each row of the parts went
    if any(part.order is not None for part in parts):
        order = torch.cat([part.arranged for part in parts])
        place = torch.arange(len(order), device=order.device)
    features, rows, groups = [], [], []
    for part, here in zip(parts, place.split([part.count for part in parts]), strict=True):
        if part.features is not None:
            features.append(part.features)
            rows.append(here if part.rows is None else here[part.rows])
        if part.groups is not None:
            groups.append(_regrouped(part.groups, here))
    return Selection(
        kept=kept,
        order=order,
        features=torch.cat(features) if features else None,
        rows=torch.cat(rows) if rows else None,
        projected=any(part.projected for part in parts),
        groups=_by_row(torch.cat(groups, 1)) if groups else None,
        scores=_united([part.scores for part in parts if part.scores is not None]),
    )


def rearranged(selection: Selection, arrangement: Tensor) -> Selection:
    """The same rows in another order: first row `arrangement[0]`, then `arrangement[1]`, ..."""
    place = arrangement.argsort()  # where each row goes
    features, rows, groups = selection.features, selection.rows, selection.groups
    if features is not None:
        rows, by_row = (place if rows is None else place[rows]).sort()
        features = features[by_row]
    return replace(
        selection,
        order=selection.arranged[arrangement],
        features=features,
        rows=rows,
        groups=None if groups is None else _by_row(_regrouped(groups, place)),
    )


def with_newlines(chosen: Selection, newlines: Tensor) -> Selection:
    """Add newline tokens, each before the first row that lies behind it.

    Where the rows are not in raster order, a row lies as far as the farthest row so far.
    """
    if not len(newlines):
        return chosen
    kept = torch.cat([chosen.kept, newlines]).sort().values
    order = chosen.arranged
    reach = torch.cat([order.cummax(0).values, newlines])
    arranged = reach.argsort(stable=True)
    place = arranged.argsort()[: len(order)]  # where each row of the method went
    rows = torch.arange(len(order), device=place.device) if chosen.rows is None else chosen.rows
    return replace(
        chosen,
        kept=kept,
        order=None if chosen.order is None else torch.cat([order, newlines])[arranged],
        rows=None if chosen.features is None else place[rows],
        groups=None if chosen.groups is None else _regrouped(chosen.groups, place),
    )


def composed(chosen: Selection, tokens: Tensor, members: Tensor | None) -> Tensor | None:
    """Pairs of a new row and a token in it, where `chosen` is of rows that stand for more already.

    Args:
        tokens: (K,) the token that each row before is, -1 for none.
        members: (2, G) pairs of such a row and a token in it, sorted by row; None: each is one
            token as it was.
    """
    if chosen.groups is None and members is None:
        return None
    rows = chosen.arranged
    none = rows.new_zeros(2, 0)
    groups = none if chosen.groups is None else chosen.groups
    members = none if members is None else members
    merged = members[0].bincount(minlength=len(tokens)) > 0
    # Rows that stay what they were, and were merged earlier.
    carried = (rows >= 0) & merged[rows.clamp_min(0)]
    carried[groups[0]] = False
    new = carried.nonzero()[:, 0]
    pairs = torch.cat([groups, torch.stack([new, rows[new]])], 1)
    plain = (~merged & (tokens >= 0)).nonzero()[:, 0]
    before = torch.cat([members, torch.stack([plain, tokens[plain]])], 1)
    before = before[:, before[0].argsort(stable=True)]
    counts = before[0].bincount(minlength=len(tokens))
    starts = counts.cumsum(0) - counts
    repeats = counts[pairs[1]]
    within = torch.arange(int(repeats.sum()), device=rows.device)
    within = within - (repeats.cumsum(0) - repeats).repeat_interleave(repeats)
    token = before[1][starts[pairs[1]].repeat_interleave(repeats) + within]
    composed = torch.stack([pairs[0].repeat_interleave(repeats), token])
    return composed[:, composed[0].argsort(stable=True)]


def _united(parts: Sequence[Tensor]) -> Tensor | None:
    """Scores (N,) of different tokens each, NaN for the others', as one."""
    return reduce(lambda one, two: one.where(two.isnan(), two), parts) if parts else None


def _regrouped(groups: Tensor, place: Tensor) -> Tensor:
    """Row i becomes row `place[i]`."""
    return torch.stack([place[groups[0]], groups[1]])


def _by_row(groups: Tensor) -> Tensor:
    return groups[:, groups[0].argsort(stable=True)]

"""Greedy facility location: each pick adds most to how well the picks stand for all tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from . import cosine

_BLOCK = 256  # rows of similarities worked on at once, so that they stay in a CPU's cache


def greedy_cover(
    unit: Tensor,
    bonus: Tensor,
    count: int,
    *,
    weights: Tensor | None = None,
    least: float = -1,
) -> Tensor:
    """Pick tokens Y for a large sum over all tokens x of max over y in Y of s(x, y), plus bonuses.

    s is the cosine similarity moved to 0..1, or as it is from `least` on. A pick lowers the gains
    of others only through the tokens that it covers better than the picks before did. These are few
    after the first picks, and only their rows are read again: what the plain rule picks, for about
    ln(count) passes over all pairs instead of `count`. Gains are summed in float64, so that no
    error piles up. Ties go to the lower index.

    Args:
        unit: (N, D) float32, rows of length 1.
        bonus: (N,), what each token adds by itself, where s is in 0..1.
        count: how many, 1 <= count <= N.
        weights: (N,), not negative: what each pick adds is multiplied by its own; None: by 1.
        least: the cosine from which on a token is covered.

    Returns:
        (count,) int64 indices in the order of picking.
    """
    rows = _reader(unit)
    numbers = torch.arange(len(unit), device=unit.device)
    # In cosines, which start from `least`, -1: everything is twice what it is in s.
    covered = unit.new_full((len(unit),), least)
    gains = 2 * bonus.double() - least * len(unit)
    for part in numbers.split(_BLOCK):
        cosines = rows(part)
        cosines = cosines if least == -1 else cosines.clamp_min_(least)
        gains += cosines.sum(0, dtype=torch.float64)
    weighed = None if weights is None else weights.double()

    picks = torch.empty(count, dtype=torch.int64, device=unit.device)
    torch.argmax(_weighed(gains, weighed), dim=0, keepdim=True, out=picks[:1])
    for i in range(1, count):
        last = picks[i - 1 : i]
        better = torch.maximum(covered, rows(last)[0])
        for part in (numbers,) if _reads_all(unit) else _changed(covered, better):
            gains -= _lost(rows(part), covered[part], better[part])
        covered = better
        gains.index_fill_(0, last, -torch.inf)  # for good: a pick is out of the race
        torch.argmax(_weighed(gains, weighed), dim=0, keepdim=True, out=picks[i : i + 1])
    return picks


def _weighed(gains: Tensor, weights: Tensor | None) -> Tensor:
    """Gains by weight; those that are out of the race stay so, whatever their weight."""
    return gains if weights is None else torch.where(gains.isinf(), gains, gains * weights)


def _reads_all(unit: Tensor) -> bool:
    """Whether to read the rows that did not change as well, which alters nothing.

    An accelerator does so sooner than it tells the host how many changed.
    """
    return len(unit) <= cosine.STORE_UP_TO and not unit.is_cpu


def _changed(before: Tensor, after: Tensor) -> Sequence[Tensor]:
    return (after > before).nonzero()[:, 0].split(_BLOCK)


def _reader(unit: Tensor) -> Callable[[Tensor], Tensor]:
    """Cosines of the tokens with given numbers (m,) to all others: (m, N), a new tensor.

    With itself a token has 1 to the last bit, so that rounding breaks no tie.
    """
    if len(unit) <= cosine.STORE_UP_TO:
        stored = cosine.gram(unit).fill_diagonal_(1)
        return lambda numbers: stored.index_select(0, numbers)
    return lambda numbers: (unit.index_select(0, numbers) @ unit.T).scatter_(1, numbers[:, None], 1)


def _lost(rows: Tensor, before: Tensor, after: Tensor) -> Tensor:
    """By how much gains (N,) fall as the tokens of `rows` (m, N) are covered `after` (m,) instead
    of `before` (m,). Overwrites `rows`."""
    torch.maximum(rows, before[:, None], out=rows)
    torch.minimum(rows, after[:, None], out=rows)
    return rows.sum(0, dtype=torch.float64) - before.sum(dtype=torch.float64)

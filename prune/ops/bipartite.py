"""Rows in two sides by turns, of which some merge into their best partner on the other side."""

from __future__ import annotations

import torch
from torch import Tensor

from .topk import ascending, top_k


def sides(rows: Tensor, prefix: int) -> tuple[Tensor, Tensor]:
    """The rows (B, N, ...) with even and with odd numbers, (B, N_A, ...) and (B, N_B, ...), counted
    with `prefix` rows in front that are not among them."""
    first = prefix % 2
    return rows[:, first::2], rows[:, 1 - first :: 2]


def matched(
    scores: Tensor, prefix: int, merged: int, back: int = 0, *, in_order: bool
) -> tuple[Tensor, Tensor]:
    """First the `merged` rows of A with the best partners merge into these; then, into rows of A
    that are left, the `back` rows of B with the best partners among those, whatever they hold.

    Ties go to the lower row. Rows of A come first: ascending if `in_order`, else by falling score.
    Behind them are the rows of B: ascending, or by falling score where `back` of them merge.

    Args:
        scores: (B, N_A, N_B) of the two `sides`.
        prefix: as for `sides`.
        merged: at most N_A; below it where `back` is not 0.
        back: at most N_B.

    Returns:
        the row that each new one stands for (B, K), and the new row that each row goes into (B, N).
    """
    of_a, of_b = scores.shape[1:]
    best, partner = scores.max(2)
    ranked = top_k(best, of_a)
    moved, left = ranked[:, :merged], ranked[:, merged:]
    left = ascending(left) if in_order else left
    numbers = torch.arange(of_a + of_b, device=scores.device).expand(len(scores), -1)
    kept_a = of_a - merged
    in_b = numbers[:, kept_a : kept_a + of_b]  # the new row of each of B, where all of them stay
    left_b = numbers[:, :of_b]
    if back:
        best, host = scores.gather(1, left[..., None].expand(-1, -1, of_b)).max(1)
        left_b = top_k(best, of_b)[:, back:]
        in_b = host.scatter(1, left_b, numbers[:, kept_a : kept_a + of_b - back])
    in_a = torch.empty_like(partner).scatter(1, left, numbers[:, :kept_a])
    in_a = in_a.scatter(1, moved, in_b.gather(1, partner.gather(1, moved)))
    first = prefix % 2
    owner = torch.empty_like(numbers, memory_format=torch.contiguous_format)
    owner[:, first::2], owner[:, 1 - first :: 2] = in_a, in_b
    return torch.cat([2 * left + first, 2 * left_b + 1 - first], 1), owner

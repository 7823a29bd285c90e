"""Tokens merged into rows: which are left, which are nearest, sums and means over bags of them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag


def complement(indices: Tensor, num_tokens: int) -> Tensor:
    """The tokens not among the unique `indices` (..., k), ascending: (..., num_tokens - k).

    The length is known from sizes alone, so that the host need not wait.
    """
    *batch, k = indices.shape
    mask = torch.zeros(*batch, num_tokens, dtype=torch.int8, device=indices.device)
    mask = mask.scatter(-1, indices, 1)
    return mask.argsort(dim=-1, stable=True)[..., : num_tokens - k]


def top_set(scores: Tensor, k: int) -> Tensor:
    """The indices of the `k` largest scores of each row, ascending; ties go to the lower index.

    What sorting the rows would find, several times as fast for the few of many.

    Args:
        scores: (K, N).
        k: 0 <= k <= N.

    Returns:
        (K, k) int64.
    """
    if k == 0:
        return scores.new_empty(len(scores), 0, dtype=torch.int64)
    least = scores.topk(k).values[:, -1:]
    above, tied = scores > least, scores == least
    room = k - above.sum(1, keepdim=True)
    among = above | (tied & (tied.cumsum(1) <= room))  # k of each row
    return among.to(torch.int8).topk(k).indices.sort().values


def bags(
    features: Tensor, members: Tensor, starts: Tensor, weights: Tensor | None = None
) -> Tensor:
    """One row per bag of tokens: the mean of its members, or their sum weighted by `weights`.

    Summed in float32, member after member, so that a result does not depend on the run. A bag
    without members is zero.

    Args:
        features: (N, C).
        members: (G,) int64, the bags one after the other.
        starts: (K,) int64, ascending: where each bag begins in `members`.
        weights: (G,), or None.

    Returns:
        (K, C) in the dtype of `features`.
    """
    if weights is not None:
        weights = weights.float()
    mode = "mean" if weights is None else "sum"
    rows = embedding_bag(members, features.float(), starts, mode=mode, per_sample_weights=weights)
    return rows.to(features.dtype)

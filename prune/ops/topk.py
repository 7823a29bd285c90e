"""Top-k with one rule for ties, the same on every device."""

from __future__ import annotations

from torch import Tensor


def top_k(scores: Tensor, k: int) -> Tensor:
    """Indices of the `k` largest scores, largest first; equal scores in ascending index order.

    `torch.topk` leaves the order of equal scores open, and CPU and CUDA differ there.

    Args:
        scores: (..., N), compared in float32.
        k: how many, 0 <= k <= N.

    Returns:
        (..., k) int64.
    """
    return scores.float().sort(dim=-1, descending=True, stable=True).indices[..., :k]


def ascending(indices: Tensor) -> Tensor:
    """The indices (..., K) in raster order, as a `Selection` wants them."""
    return indices.sort(dim=-1).values

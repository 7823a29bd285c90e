"""Greedy maximisation of a determinant (fast MAP inference of a DPP), for many tiles at once."""

from __future__ import annotations

import torch
from torch import Tensor

from .cosine import gram
from .fusing import fusable

_TINY = 1e-24  # of a squared norm: a token of zeros is like nothing
_FUSED_UP_TO = 4096  # tokens: one program reads the rows of all its earlier picks at every pick


def weighted_cosines(features: Tensor, weights: Tensor) -> Tensor:
    """Kernel w_i cos(x_i, x_j) w_j: (N, N) of features (N, D) and weights (N,), in float32."""
    kernel = gram(features.float())
    scale = weights / kernel.diagonal().clamp_min(_TINY).sqrt()
    return kernel.mul_(scale[:, None]).mul_(scale)


def greedy_map(kernels: Tensor, count: int, fallback: Tensor) -> Tensor:
    """In each kernel, pick the tokens that make the determinant of the picks grow most.

    A pick adds one row to a Cholesky factor, which costs O(N) for each pick before it; what is left
    of the diagonal is the growth that the next pick would bring. Once nothing positive is left, the
    picks span all tokens (up to rounding) and every further determinant is 0: the rest is taken by
    `fallback`, largest first. Picks stay on the device, where a GPU makes all of them in one
    kernel. Ties go to the lower index, and fewer picks are the beginning of more.

    Args:
        kernels: (B, N, N) float32, symmetric, positive semidefinite.
        count: how many, 1 <= count <= N.
        fallback: (B, N).

    Returns:
        (B, count) int64 indices in the order of picking.
    """
    if fusable(kernels, _FUSED_UP_TO):
        from . import fused  # Triton, which is there on a GPU only

        return _completed(*fused.determinant(kernels, count), fallback)
    num_tokens = kernels.shape[-1]
    growth = kernels.diagonal(dim1=1, dim2=2).clone()
    factor = kernels.new_zeros(len(kernels), count, num_tokens)
    picks = fallback.new_empty(len(kernels), count, dtype=torch.int64)
    found = torch.empty_like(picks, dtype=torch.bool)
    for i in range(count):
        best, pick = growth.max(1, keepdim=True)
        picks[:, i : i + 1] = pick
        found[:, i : i + 1] = best > 0
        column = pick[:, :, None]
        row = kernels.gather(1, column.expand(-1, 1, num_tokens))
        if i:
            done = factor[:, :i]
            at_pick = done.gather(2, column.expand(-1, i, 1))
            row = torch.baddbmm(row, at_pick.transpose(1, 2), done, alpha=-1)
        row = torch.where(best > 0, row[:, 0] / best.sqrt(), 0)
        factor[:, i] = row
        growth.addcmul_(row, row, value=-1).scatter_(1, pick, -torch.inf)
    return _completed(picks, found, fallback)


def _completed(picks: Tensor, found: Tensor, fallback: Tensor) -> Tensor:
    """The picks (B, K) that were `found`, then the other tokens by `fallback`: (B, K)."""
    count = picks.shape[1]
    later = fallback.argsort(dim=1, descending=True, stable=True).argsort(1) + count
    steps = torch.arange(count, device=picks.device).expand_as(picks)
    place = later.scatter(1, picks, torch.where(found, steps, later.gather(1, picks)))
    return place.argsort(1)[:, :count]

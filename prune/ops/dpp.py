"""Greedy maximisation of a determinant (fast MAP inference of a DPP), for many tiles at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from . import cosine
from .on_gpu import in_one_kernel

_TINY = 1e-24  # of a squared norm: a token of zeros is like nothing
_MOST_TOKENS = 4096  # tokens: one program reads the rows of all its earlier picks at every pick


def weighted_greedy_map(images: Sequence[Tensor], weights: Tensor, count: int) -> Tensor:
    """`greedy_map` of the kernels of `weighted_cosines`, which are not stored where they would be
    too large; what no determinant tells apart goes by weight.

    Args:
        images: (N, D) each, of the same size.
        weights: (B, N), not negative.
        count: how many, 1 <= count <= N.

    Returns:
        (B, count) int64 indices in the order of picking.
    """
    if len(images[0]) > cosine.STORE_UP_TO:
        alone = zip(images, weights.split(1), strict=True)
        return torch.cat([_unstored(features, own, count) for features, own in alone])
    parts = list(cosine.at_once(images))
    of_parts = weights.split([len(part) for part in parts])
    return torch.cat(
        [
            greedy_map(weighted_cosines(part, own), count, own)
            for part, own in zip(parts, of_parts, strict=True)
        ]
    )


def weighted_cosines(images: Sequence[Tensor], weights: Tensor) -> Tensor:
    """Kernels w_i cos(x_i, x_j) w_j: (B, N, N) of features (N, D) each and weights (B, N), in
    float32."""
    kernels = cosine.grams([features.float() for features in images])
    scale = _scale(kernels.diagonal(dim1=1, dim2=2), weights)
    return kernels.mul_(scale[:, :, None]).mul_(scale[:, None])


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
    if in_one_kernel(kernels, _MOST_TOKENS):
        from . import triton_kernels  # Triton, which is there on a GPU only

        return _completed(*triton_kernels.determinant(kernels, count), fallback)
    rows, growth = partial(cosine.rows_of, kernels), kernels.diagonal(dim1=1, dim2=2)
    return _completed(*_picks(rows, growth, count), fallback)


def _unstored(features: Tensor, weights: Tensor, count: int) -> Tensor:
    """The picks (1, count) among tokens (N, D) of weights (1, N), rows computed when needed."""
    features = features.float()
    squares = features.square().sum(1)
    scale = _scale(squares, weights)

    def row(pick: Tensor) -> Tensor:
        products = features @ features.index_select(0, pick[0])[0]
        return products * scale * scale.gather(1, pick)

    return _completed(*_picks(row, squares * scale.square(), count), weights)


def _scale(squares: Tensor, weights: Tensor) -> Tensor:
    """What products of tokens with these squared norms are multiplied by, on either side."""
    return weights / squares.clamp_min(_TINY).sqrt()


def _picks(rows: Callable[[Tensor], Tensor], growth: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The picks (B, count), and whether the determinant grew by them.

    `rows` gives those (B, N) of the kernels that belong to one token of each, (B, 1); `growth`
    (B, N) is what is on their diagonals.
    """
    growth = growth.clone()
    batch_size, num_tokens = growth.shape
    factor = growth.new_zeros(batch_size, count, num_tokens)
    picks = growth.new_empty(batch_size, count, dtype=torch.int64)
    found = torch.empty_like(picks, dtype=torch.bool)
    for i in range(count):
        best, pick = growth.max(1, keepdim=True)
        picks[:, i : i + 1] = pick
        found[:, i : i + 1] = best > 0
        row = rows(pick)[:, None]
        if i:
            done = factor[:, :i]
            at_pick = done.gather(2, pick[:, :, None].expand(-1, i, 1))
            row = torch.baddbmm(row, at_pick.transpose(1, 2), done, alpha=-1)
        row = torch.where(best > 0, row[:, 0] / best.sqrt(), 0)
        factor[:, i] = row
        growth.addcmul_(row, row, value=-1).scatter_(1, pick, -torch.inf)
    return picks, found


def _completed(picks: Tensor, found: Tensor, fallback: Tensor) -> Tensor:
    """The picks (B, K) that were `found`, then the other tokens by `fallback`: (B, K)."""
    count = picks.shape[1]
    later = fallback.argsort(dim=1, descending=True, stable=True).argsort(1) + count
    steps = torch.arange(count, device=picks.device).expand_as(picks)
    place = later.scatter(1, picks, torch.where(found, steps, later.gather(1, picks)))
    return place.argsort(1)[:, :count]

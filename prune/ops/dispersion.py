"""Greedy dispersion from a given token: each pick is the token least like those picked before."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from . import cosine
from .on_gpu import in_one_kernel

Rule = Literal["max_sum", "k_center"]
"""Least like in sum over the picks, or least like the pick that it resembles most."""


def greedy_dispersion(images: Sequence[Tensor], first: Tensor, count: int, rule: Rule) -> Tensor:
    """Pick `first` and `count - 1` more tokens of each image by their cosine similarities to the
    picks so far.

    The sums or maxima are kept up to date, so that a pick costs O(N), for all images at once. Picks
    stay on the device: the host never waits, and a GPU makes all of them in one kernel. No token is
    picked twice, and ties go to the lower index.

    Args:
        images: (N, D) each, of the same size, compared in float32.
        first: (B,) int64, a token of each.
        count: how many, 1 <= count <= N.

    Returns:
        (B, count) int64 indices in the order of picking.
    """
    units = [normalize(features.float(), dim=-1) for features in images]
    if len(units[0]) > cosine.STORE_UP_TO:
        alone = zip(units, first.split(1), strict=True)
        return torch.cat(
            [_picks(partial(_row, unit), len(unit), f, count, rule) for unit, f in alone]
        )
    starts = first.split([len(part) for part in cosine.at_once(units)])
    parts = zip(cosine.at_once(units), starts, strict=True)
    return torch.cat([_stored(part, start, count, rule) for part, start in parts])


def _stored(units: Sequence[Tensor], first: Tensor, count: int, rule: Rule) -> Tensor:
    """The picks (B, count) in rows (N, D) of length 1, from their products in memory."""
    products = cosine.grams(units)
    if in_one_kernel(products):
        from . import triton_kernels  # Triton, which is there on a GPU only

        return triton_kernels.dispersion(products, first, count, by_sum=rule == "max_sum")
    return _picks(partial(cosine.rows_of, products), len(units[0]), first, count, rule)


def _row(unit: Tensor, token: Tensor) -> Tensor:
    """The products (1, N) of one token (1, 1) with all rows (N, D)."""
    return (unit @ unit.index_select(0, token[0])[0])[None]


def _picks(
    rows: Callable[[Tensor], Tensor], num_tokens: int, first: Tensor, count: int, rule: Rule
) -> Tensor:
    """The picks (B, count), `rows` giving the products (B, N) of one token of each image (B, 1)."""
    last = first[:, None]
    picks = last.repeat(1, count)
    start = 0.0 if rule == "max_sum" else -torch.inf
    likeness = torch.full((len(first), num_tokens), start, device=first.device)
    for i in range(1, count):
        if rule == "max_sum":
            likeness += rows(last)
        else:
            torch.maximum(likeness, rows(last), out=likeness)
        likeness.scatter_(1, last, torch.inf)  # for good: a pick is out of the race
        last = likeness.argmin(1, keepdim=True)
        picks[:, i : i + 1] = last
    return picks

"""Greedy coverage, weighed: each pick's gain counts by its own weight, for many images at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

from . import cosine
from .facility import greedy_cover

_AT_ONCE = 1024  # tokens of an image: all pairs are read again at every pick


def weighed_cover(images: Sequence[Tensor], weights: Tensor, count: int, *, added: bool) -> Tensor:
    """Pick tokens by how much better they cover all tokens of their image than the picks before.

    A token is covered by its largest cosine with a pick, 0 at least. What a pick adds to the sum of
    that over all tokens is multiplied by its weight, or that is added. Ties go to the lower index.

    Args:
        images: (N, D) each, of the same size.
        weights: (B, N), not negative.
        count: how many, 1 <= count <= N.
        added: whether weights are added.

    Returns:
        (B, count) int64 indices in the order of picking.
    """
    units = [normalize(features.float(), dim=-1) for features in images]
    if len(units[0]) > _AT_ONCE:
        pairs = zip(units, weights, strict=True)
        return torch.stack([_alone(unit, own, count, added) for unit, own in pairs])
    parts = list(cosine.at_once(units))
    of_parts = weights.split([len(part) for part in parts])
    return torch.cat(
        [_together(part, own, count, added) for part, own in zip(parts, of_parts, strict=True)]
    )


def _together(units: Sequence[Tensor], weights: Tensor, count: int, added: bool) -> Tensor:
    """Of images whose cosines are stored: (B, count)."""
    alike = cosine.grams(units)
    alike.diagonal(dim1=1, dim2=2).fill_(1)
    weights = weights.double()
    covered = torch.zeros_like(weights, dtype=alike.dtype)
    gone = torch.zeros_like(weights)
    picks = torch.empty(len(alike), count, dtype=torch.int64, device=alike.device)
    for i in range(count):
        gains = (alike - covered[:, None]).clamp_min_(0).sum(2, dtype=torch.float64)
        scores = (gains + weights if added else gains * weights) + gone
        pick = scores.argmax(1, keepdim=True)
        picks[:, i : i + 1] = pick
        gone.scatter_(1, pick, -torch.inf)
        covered = torch.maximum(covered, cosine.rows_of(alike, pick))
    return picks


def _alone(unit: Tensor, weights: Tensor, count: int, added: bool) -> Tensor:
    """Of one image, reading the tokens alone that are covered better: (count,)."""
    if added:
        return greedy_cover(unit, weights / 2, count, least=0)
    return greedy_cover(unit, torch.zeros_like(weights), count, weights=weights, least=0)

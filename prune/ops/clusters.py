"""Clusters around density peaks (DPC-kNN), and their members merged into one row each."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from .cosine import gram
from .merge import bags
from .topk import top_k

_BLOCK = 256
_EPSILON = 1e-6  # beside the number of members that a row is divided by


def density_clusters(points: Tensor, count: int) -> Tensor:
    """The cluster of each point, 0 for the one with the foremost centre.

    A centre lies densely (its `count` nearest points, itself included, are near) and far from all
    denser points: the product of both is largest. Every point joins the centre nearest to it. Of
    points that lie equally densely, the lower index is the denser one; other ties go to the lower
    index as well.

    Args:
        points: (M, D), of which (M, M) matrices are made: products in float64 and distances in
            float32, 12 bytes a pair.
        count: clusters, 1 <= count <= M.

    Returns:
        (M,) int64; no cluster is empty.
    """
    distances = _distances(points)
    centres = _peaks(distances, count)
    # Rows in the order of `centres`: the first of equally near ones is the foremost.
    owner = distances[centres].argmin(0)
    return owner.index_copy(0, centres, torch.arange(count, device=owner.device))


def merged_clusters(features: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Merge features (M, D) to `count` rows, each the mean of a cluster (short of a millionth).

    Returns:
        rows (count, D) in the dtype of `features`, by how prominent their centres are, and pairs
        (2, M) int64 of a row and a member, sorted by row.
    """
    owner, members = density_clusters(features.detach(), count).sort(stable=True)
    edges = torch.searchsorted(owner, torch.arange(count + 1, device=owner.device))
    weights = 1 / (edges.diff().float() + _EPSILON)
    rows = bags(features, members, edges[:-1], weights[owner])
    return rows, torch.stack([owner, members])


def _distances(points: Tensor) -> Tensor:
    """Distances over the root of the width: (M, M) float32, symmetric, 0 on the diagonal."""
    # In double precision, as what points share cancels out: those that are alike stay apart as far
    # as they are, and equal distances are equal on every device.
    points = points.double()
    products = gram(points)
    squares = products.diagonal().clone()
    distances = points.new_empty(products.shape, dtype=torch.float32)
    for part in _blocks(len(points)):
        apart = (squares[part, None] + squares).sub_(products[part], alpha=2).clamp_min_(0)
        distances[part] = apart.div_(points.shape[1]).sqrt_()
    return distances.fill_diagonal_(0)


def _peaks(distances: Tensor, count: int) -> Tensor:
    """The `count` centres, foremost first: (count,).

    Density is exp(-mean squared distance to the nearest points). It is compared by its logarithm,
    which orders alike and does not vanish where points are far apart.
    """
    density, reach = distances.new_empty(2, len(distances)).unbind()
    for part in _blocks(len(distances)):
        nearest = distances[part].topk(count, largest=False).values
        density[part] = -nearest.square().mean(1)
    place = density.argsort(descending=True, stable=True).argsort()  # 0: the densest
    for part in _blocks(len(distances)):
        denser = place < place[part, None]
        # The densest has none denser, and comes first: the rule gives it the largest distance of
        # all.
        reach[part] = distances[part].masked_fill(~denser, math.inf).amin(1)
    return top_k(density + reach.log(), count)


def _blocks(num_points: int) -> Iterator[slice]:
    """Rows of a matrix that are worked on at once, so that no second one is made."""
    return (slice(start, start + _BLOCK) for start in range(0, num_points, _BLOCK))

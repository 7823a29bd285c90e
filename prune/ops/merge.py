"""Tokens merged into rows: which are left, which are nearest, sums and means over bags of them."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor
from torch.nn.functional import embedding_bag, normalize


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


def merged_evenly(
    features: Tensor, metric: Tensor, rest: Tensor, count: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Merge the tokens `rest` of each image to rows: every so many-th is the target of one, and
    each other token joins the target that it is most like. A row is its target plus the mean of the
    others.

    Args:
        features: (B, N, C).
        metric: (B, N, D), whose cosines are compared.
        rest: (B, M) int64, ascending.
        count: rows of each image, 0 <= count <= M.

    Returns:
        targets (B, count) and rows (B, count, C) in the dtype of `features`; of each of `rest`, row
        by row, the number of its row and the token itself, (B, M) each: (B, 0) without rows.
    """
    if not count:
        return rest[:, :0], features[:, :0], rest[:, :0], rest[:, :0]
    (tiles, others), num_patches = rest.shape, features.shape[1]
    tile = torch.arange(tiles, device=rest.device)[:, None]
    places = torch.arange(count, device=rest.device).repeat(tiles, 1)
    spaced = places * (others // count)
    unit = normalize(metric[tile, rest], dim=-1)
    owner = (unit @ unit[tile, spaced].mT).argmax(2).scatter(1, spaced, places)
    owner, by_owner = owner.sort(stable=True)
    members, targets = rest.gather(1, by_owner), rest.gather(1, spaced)
    starts = torch.searchsorted(owner, places)
    assigned = torch.searchsorted(owner, places, right=True) - starts - 1
    is_target = members == targets.gather(1, owner)
    weights = torch.where(is_target, 1, (1 / assigned.clamp_min(1)).gather(1, owner))
    means = bags(
        rearrange(features, "b n c -> (b n) c"),
        (members + tile * num_patches).flatten(),
        (starts + tile * others).flatten(),
        weights.flatten(),
    )
    return targets, rearrange(means, "(b k) c -> b k c", k=count), owner, members


def merged_nearest(features: Tensor, kept: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Merge every token that is not kept into the kept one that it is most like, by cosine (the
    first of equal ones). A row is the mean of all that are in it.

    Args:
        features: (B, N, C).
        kept: (B, K) int64, unique in each image.

    Returns:
        rows (B, K, C) in the dtype of `features`, in the order of `kept`; and of all tokens, row by
        row, the number of their row and the token itself, (B, N) each.
    """
    images, num_tokens = features.shape[:2]
    image = torch.arange(images, device=kept.device)[:, None]
    places = torch.arange(kept.shape[1], device=kept.device).expand_as(kept)
    unit = normalize(features.float(), dim=-1)
    owner = (unit @ unit[image, kept].mT).argmax(2).scatter(1, kept, places)
    owner, members = owner.sort(stable=True)
    starts = torch.searchsorted(owner, places.contiguous())
    rows = bags(
        rearrange(features, "b n c -> (b n) c"),
        (members + image * num_tokens).flatten(),
        (starts + image * num_tokens).flatten(),
    )
    return rearrange(rows, "(b k) c -> b k c", b=images), owner, members

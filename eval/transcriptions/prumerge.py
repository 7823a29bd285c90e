"""LLaVA-PruMerge: for every kept token, all keys and features are joined and compared."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from .picture import Picture

MOVES_ROWS = True
_NEIGHBOURS = 32


def read(picture: Picture) -> tuple[Tensor, Tensor]:
    """CLS attention (tiles, P) with all heads as one, and the keys (tiles, S, C)."""
    query, key = (x[23].transpose(1, 2).flatten(2) for x in (picture.queries, picture.keys))
    return one_head_map(query, key)[:, 0, 1:], key


def choose(picture: Picture, scores: tuple[Tensor, Tensor], keep: int) -> Tensor:
    """Tiles one by one, `keep` rows of them with the row that holds what was dropped."""
    rows = []
    for tile, (attention, key) in enumerate(zip(*scores, strict=True)):
        kept = attention.topk(keep // picture.tiles - 1).indices
        rows.append(merged(picture.hidden[tile, 1:], key[1:], attention, kept))
    return torch.cat(rows)


def one_head_map(query: Tensor, key: Tensor) -> Tensor:
    """The whole map (..., S, S) of queries and keys of full width (..., S, C)."""
    return (query @ key.transpose(-1, -2) * key.shape[-1] ** -0.5).softmax(-1)


def outliers(attention: Tensor) -> Tensor:
    """Indices of the scores far above the upper quartile, largest first."""
    low, high = np.percentile(attention.numpy(), [25, 75])
    ratio = float((attention > high + 1.5 * (high - low)).sum()) / len(attention)
    return attention.topk(int(len(attention) * ratio)).indices


def merged(features: Tensor, keys: Tensor, attention: Tensor, kept: Tensor) -> Tensor:
    """Rows (K + 1, C): each kept token with its nearest others, and one row of all that goes.

    Args:
        features, keys: (P, C).
        attention: (P,).
        kept: (K,) in the order of the rows.
    """
    keys = normalize(keys, dim=-1)
    gone = torch.ones(len(features), dtype=torch.bool)
    gone[kept] = False
    kept_keys, kept_features, kept_attention = keys[kept], features[kept], attention[kept]
    gone_keys, gone_features, gone_attention = keys[gone], features[gone], attention[gone]
    rows = torch.zeros_like(kept_features)
    for i in range(len(kept)):
        others = torch.cat([kept_keys[:i], kept_keys[i + 1 :], gone_keys])
        their_features = torch.cat([kept_features[:i], kept_features[i + 1 :], gone_features])
        their_attention = torch.cat([kept_attention[:i], kept_attention[i + 1 :], gone_attention])
        nearest = (kept_keys[i : i + 1] @ others.T)[0].topk(_NEIGHBOURS).indices
        weighed = their_features[nearest] * their_attention[nearest][:, None]
        rows[i] = kept_features[i] + weighed.sum(0)
    aggregate = (gone_features * gone_attention[:, None]).sum(0, keepdim=True)
    return torch.cat([rows, aggregate])

"""Attention that reads the values of the keys that each query attends to most, and no others."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor

from .scores import capped, chunk_of, logits_of


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    scaling: float,
    share: float,
    softcap: float | None = None,
    maps: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """What each query reads, (B, Q, H, D_head); with `maps` also its attention (B, H, Q, S), 0
    where no value is read: it is not brought back to a sum of 1.

    Of the keys that a query sees, the share is rounded up. The softmax is float32, equal attention
    goes to the earlier key. Several queries multiply all values, by zeros: a single one gathers.

    Args:
        query: (B, H, Q, D_head).
        key, value: (B, H_kv, S, D_head).
        mask: (B | 1, 1, Q, S) bool, what is seen, or numbers that are added to logits; None: all
            keys up to the query's own, the last query's being the last.
        softcap: the most that a logit approaches; None: any.
    """
    size, outputs, weights = chunk_of(query, key, len(query)), [], []
    stored = key.shape[2]
    for start in range(0, query.shape[2], size):
        part = query[:, :, start : start + size]
        if mask is None:
            first = stored - query.shape[2] + start
            own = _before(first, part.shape[2], stored, query.device)
        else:
            own = mask[:, :, start : start + size, :stored]
        seen = own if own.dtype == torch.bool else own > torch.finfo(own.dtype).min / 2
        logits = capped(logits_of(part, key, scaling), softcap)
        if own.dtype != torch.bool:
            logits = logits + own.float()
        attention = logits.masked_fill(~seen, torch.finfo(logits.dtype).min).softmax(-1)
        kept, number = _largest(attention, seen.sum(-1, keepdim=True), share)
        kept = kept.to(value.dtype)
        outputs.append(_read(kept, number, value))
        if maps:
            weights.append(_whole(kept, number, stored))
    return torch.cat(outputs, 1), torch.cat(weights, 2) if maps else None


def _before(first: int, count: int, keys: int, device: torch.device) -> Tensor:
    """The keys up to their own that queries from number `first` on see: (1, 1, Q, S) bool."""
    own = torch.arange(first, first + count, device=device)[:, None]
    return (torch.arange(keys, device=device) <= own)[None, None]


def _largest(attention: Tensor, seen: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """The largest attention of each row and whose it is, (B, H, Q, K) each; 0 behind what its own
    share of `seen` (B | 1, 1, Q, 1) keys reaches."""
    most = max(1, _up(share * attention.shape[-1]))
    found = attention.sort(dim=-1, descending=True, stable=True)
    allowed = (seen * share - 1e-6).ceil().clamp_min(1)
    over = torch.arange(most, device=attention.device) >= allowed
    return found.values[..., :most].masked_fill(over, 0), found.indices[..., :most]


def _up(number: float) -> int:
    """Rounded up, a product that floats made a little too large aside."""
    return -int(-(number - 1e-6) // 1)


def _read(weights: Tensor, number: Tensor, value: Tensor) -> Tensor:
    """Sums of values (B, H_kv, S, D_head) by weights (B, H, Q, K) of those `number` says:
    (B, Q, H, D_head)."""
    heads = value.shape[1]
    if weights.shape[2] == 1:
        at = rearrange(number, "b (g h) 1 k -> b g (h k) 1", g=heads)
        rows = value.take_along_dim(at, 2)
        own = rearrange(weights, "b (g h) 1 k -> b g h 1 k", g=heads)
        rows = rearrange(rows, "b g (h k) d -> b g h k d", k=number.shape[-1])
        return rearrange(own @ rows, "b g h 1 d -> b 1 (g h) d")
    whole = _whole(weights, number, value.shape[2])
    whole = rearrange(whole, "b (g h) q s -> b g (h q) s", g=heads)
    return rearrange(whole @ value, "b g (h q) d -> b q (g h) d", q=weights.shape[2])


def _whole(weights: Tensor, number: Tensor, keys: int) -> Tensor:
    """(B, H, Q, S), with weights where `number` says, and 0 elsewhere."""
    return weights.new_zeros(*weights.shape[:3], keys).scatter(-1, number, weights)

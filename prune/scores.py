"""Queries and keys -> numbers: rows of attention and running sums of it, without any model.

Of an encoder's attention: query and key (B, H, S, D_head), the scale of their product, and where
rows were merged, filled up or hidden from each other `bias` (B, 1, 1 or S, S): numbers that are
added to the logits of each query and key, or bools, which keys a query sees.

Softmaxes are float32. No map of all rows and columns is ever stored: sums are streamed.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor

from .sight import Sight

_QUERY_CHUNK = 64  # whose logits stay in the caches of a CPU
_HIDDEN = torch.finfo(torch.float32).min
_CHUNK_BYTES = 2**26  # of logits at once on an accelerator, where few launches count instead


def cls_row(query: Tensor, key: Tensor, scaling: float, bias: Tensor | None = None) -> Tensor:
    """Softmaxed attention of the first query, averaged over heads: (B, S)."""
    return _biased(query[:, :, :1], key, scaling, _rows_of(bias, 0, 1)).mean(1).squeeze(1)


def received(query: Tensor, key: Tensor, scaling: float, bias: Tensor | None = None) -> Tensor:
    """Attention received by each key: head mean, summed over all queries, (B, S).

    Queries go through in chunks, picture by picture: memory is O(H x chunk x S) and stays in the
    caches of a CPU, and a picture's scores do not depend on its batch.
    """
    size = chunk_of(query, key)
    total = torch.zeros(key.shape[0], key.shape[2], device=key.device, dtype=torch.float32)
    biases = _by_picture(bias, len(query))
    for sums, q, k, own in zip(total, query.split(1), key.split(1), biases, strict=True):
        filled = None if own is None else _filled(own).view(-1, 1).split(size)
        for number, chunk in enumerate(q.split(size, dim=2)):
            rows = _biased(chunk, k, scaling, _rows_of(own, number * size, chunk.shape[2]))
            if filled is not None:  # rows that fill a batch up ask nothing
                rows = rows.masked_fill(filled[number], 0)
            sums += rows.sum((0, 1, 2))
    return total.div_(query.shape[1])


def cls_logits(query: Tensor, key: Tensor, scaling: float, bias: Tensor | None = None) -> Tensor:
    """Scaled q k^T of the first query before the softmax, averaged over heads: (B, S)."""
    return _with(logits_of(query[:, :, :1], key, scaling), _rows_of(bias, 0, 1)).mean(1).squeeze(1)


def cls_row_one_head(
    query: Tensor, key: Tensor, scaling: float, bias: Tensor | None = None
) -> Tensor:
    """Softmaxed attention of the first query with all heads taken as one of full width: (B, S).

    `scaling` belongs to the split heads and is not used.
    """
    q, k = (rearrange(x, "b h s d -> b s (h d)").float() for x in (query[:, :, :1], key))
    logits = q @ k.mT * k.shape[-1] ** -0.5
    return _with(logits, None if bias is None else bias[:, 0, :1]).softmax(-1).squeeze(1)


def to_cls(query: Tensor, key: Tensor, scaling: float, bias: Tensor | None = None) -> Tensor:
    """Attention that each query gives to the first key, averaged over heads: (B, S)."""
    size = chunk_of(query, key, len(query))
    found = []
    for number, chunk in enumerate(query.split(size, dim=2)):
        rows = _biased(chunk, key, scaling, _rows_of(bias, number * size, chunk.shape[2]))
        found.append(rows[..., 0].mean(1))
    return torch.cat(found, dim=1)


def keys(query: Tensor, key: Tensor, scaling: float, bias: Tensor | None = None) -> Tensor:
    """The keys themselves, heads behind the sequence: (B, S, H, D_head)."""
    return rearrange(key, "b h s d -> b s h d")


def head_rank(
    query: Tensor,
    key: Tensor,
    scaling: float,
    bias: Tensor | None = None,
    *,
    rounds: int,
    cls_start: float,
) -> Tensor:
    """`HeadRank` of each row: (B, S, H). One picture's map is held at a time."""
    biases = _by_picture(bias, len(query))
    found = []
    for q, k, own in zip(query.split(1), key.split(1), biases, strict=True):
        votes = _biased(q, k, scaling, own)[0]  # (H, S, S): what each row gives to each column
        rank = torch.ones(votes.shape[:2], device=votes.device)
        rank[:, 0] *= cls_start
        count: Tensor | int = rank.shape[1]
        if own is not None:  # rows that fill a batch up have no vote
            filled = _filled(own)
            rank, count = rank.masked_fill(filled, 0), (~filled).sum()
        for _ in range(rounds):
            rank = (rank[:, None] @ votes)[:, 0]
        found.append(rank * (count / rank.sum(1, keepdim=True)))
    return rearrange(torch.stack(found), "b h s -> b s h")


def attention_of(
    query: Tensor, key: Tensor, seen: Tensor | None, scaling: float, softcap: float | None = None
) -> Tensor:
    """Attention of some rows of one prompt: softmax over the keys that each sees, (H, Q, S).

    Args:
        query: (H, Q, D_head).
        key: (H_kv, S, D_head).
        seen: (Q, S) bool, None where every row sees all keys.
        softcap: the most that a logit approaches; None: any.
    """
    logits = capped(logits_of(query[None], key[None], scaling), softcap)
    if seen is not None:
        logits = logits.masked_fill(~seen, _HIDDEN)
    return logits.softmax(-1)[0]


def largest_of(
    query: Tensor, key: Tensor, seen: Tensor | None, scaling: float, softcap: float | None = None
) -> Tensor:
    """Of some rows of one prompt, as in `attention_of`: what each key gets from the head that gives
    it most, averaged over rows, (S,). Rows go through in chunks."""
    total = torch.zeros(key.shape[1], device=key.device, dtype=torch.float32)
    size = chunk_of(query, key)
    for start in range(0, query.shape[1], size):
        part = slice(start, start + size)
        mask = None if seen is None else seen[part]
        total += attention_of(query[:, part], key, mask, scaling, softcap).amax(0).sum(0)
    return total.div_(query.shape[1])


def received_of(
    query: Tensor,
    key: Tensor,
    past: int,
    scaling: float,
    sight: Sight,
    softcap: float | None = None,
) -> Tensor:
    """Attention that the entries of one prompt receive: head mean, summed over rows, (S,).

    Args:
        query: (H, L, D_head), the new rows, row i being the one of key `past + i`.
        key: (H_kv, S, D_head), S = past + L.
        softcap: the most that a logit approaches; None: any.
    """
    total = torch.zeros(key.shape[1], device=key.device, dtype=torch.float32)
    size = chunk_of(query, key)
    for start in range(0, query.shape[1], size):
        chunk = query[:, start : start + size]
        first = past + start
        rows = torch.arange(first, first + chunk.shape[1], device=key.device)
        last = first + len(rows) if sight.blocks is None else key.shape[1]
        logits = capped(logits_of(chunk[None], key[None, :, :last], scaling), softcap)[0]
        seen = sight.seen(rows, last)
        if sight.plain:  # all rows of a chunk see what lies before them
            logits[..., first:].masked_fill_(~seen[:, first:], _HIDDEN)
        else:
            logits.masked_fill_(~seen, _HIDDEN)
        total[:last] += logits.softmax(-1).sum((0, 1))
    return total.div_(query.shape[0])


def gist_attention(query: Tensor, key: Tensor, scaling: float) -> Tensor:
    """Attention that the mean of queries (H, n, D_head) gives to keys (H_kv, n, D_head), mean over
    heads: (n,)."""
    mean = query.float().mean(1, keepdim=True)
    return attention_of(mean, key.float(), None, scaling).mean((0, 1))


def rotary_means(cos: Tensor, sin: Tensor) -> Tensor:
    """`RotaryMeans` of tables (axes, n, D_head), one for each axis of positions: (n, 2)."""
    means = torch.stack([table.float().mean(-1) for table in (cos, sin)], -1)
    # In order of size, so that tokens whose axes have the same positions in another order tie.
    return means.sort(0).values.mean(0)


def chunk_of(query: Tensor, key: Tensor, pictures: int = 1) -> int:
    """How many queries (..., H, Q, D_head) meet the keys (..., S, D_head) at once."""
    if query.is_cpu:
        return _QUERY_CHUNK
    of_one = 4 * pictures * query.shape[-3] * key.shape[-2]
    return max(_QUERY_CHUNK, _CHUNK_BYTES // max(1, of_one))


def capped(logits: Tensor, softcap: float | None) -> Tensor:
    return logits if softcap is None else (logits / softcap).tanh() * softcap


def _biased(query: Tensor, key: Tensor, scaling: float, bias: Tensor | None) -> Tensor:
    """softmax(q k^T + bias) in float32: (B, H, Q, S)."""
    return _with(logits_of(query, key, scaling), bias).softmax(-1)


def _with(logits: Tensor, bias: Tensor | None) -> Tensor:
    if bias is None:
        return logits
    return logits.masked_fill(~bias, _HIDDEN) if _is_bool(bias) else logits + bias.float()


def _is_bool(bias: Tensor) -> bool:
    return bias.dtype == torch.bool


def _by_picture(bias: Tensor | None, pictures: int) -> list[Tensor | None]:
    if bias is None:
        return [None] * pictures
    return list(bias.expand(pictures, -1, -1, -1).split(1))


def _rows_of(bias: Tensor | None, start: int, count: int) -> Tensor | None:
    """What is added to the logits of some queries."""
    return bias if bias is None or bias.shape[2] == 1 else bias[:, :, start : start + count]


def _filled(bias: Tensor) -> Tensor:
    """Rows of one picture that no query sees, as they fill a batch up: (1, S) bool."""
    hidden = ~bias if _is_bool(bias) else bias <= torch.finfo(bias.dtype).min / 2
    return hidden.all(2)[0]


def logits_of(query: Tensor, key: Tensor, scaling: float) -> Tensor:
    """Scaled q k^T in float32 for grouped-query attention: (B, H, Q, S)."""
    of_keys = {"g": key.shape[1], "q": query.shape[2]}  # g heads of keys, each read by h queries
    q = rearrange(query, "b (g h) q d -> (b g) (h q) d", **of_keys)
    # Three dimensions: with four, matmul copies the transposed keys at every call.
    k = rearrange(key, "b g s d -> (b g) d s")
    logits = rearrange((q @ k).float(), "(b g) (h q) s -> b (g h) q s", **of_keys)
    return logits.mul_(scaling) if not logits.requires_grad else logits * scaling

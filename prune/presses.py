"""Scores of the entries of a KV cache, by which text methods evict: (H_kv, S), high ones stay."""

from __future__ import annotations

from typing import Any, Literal, Protocol

import torch
from einops import rearrange
from torch import Tensor
from torch.nn.functional import avg_pool1d, max_pool1d

from .contract import CacheEntries, ReceivedInLayer
from .errors import MethodFieldError

Pooling = Literal["avg", "max"]


class Press(Protocol):
    """What kvpress calls a ScorerPress: higher scores (1, H_kv, S) stay."""

    def score(
        self,
        module: Any,
        hidden_states: Tensor,
        keys: Tensor,
        values: Tensor,
        attentions: Tensor | None,
        kwargs: dict[str, Any],
    ) -> Tensor: ...


def observed(entries: CacheEntries, window: int, kernel: int, pooling: Pooling) -> Tensor:
    """SnapKV: attention of the prompt's last rows, averaged, then pooled over `kernel` neighbours.

    The rows are the text behind the last visual entry, `window` at most (the last row where there
    is none). Query heads that share keys are averaged. Neighbours that are text count as nothing.
    """
    attention = _last_rows(entries, window)  # (H_kv, G, W, S)
    column = torch.arange(attention.shape[-1], device=attention.device)
    row = column[-attention.shape[2] :]
    asked = row > torch.where(entries.visual, column, -1).amax()
    asked = asked | (row == column[-1])
    scores = (asked / asked.sum() @ attention).mean(1)
    scores = scores.masked_fill(~entries.visual, 0)
    pool = avg_pool1d if pooling == "avg" else max_pool1d
    return pool(scores, kernel, stride=1, padding=kernel // 2)


def _last_rows(entries: CacheEntries, window: int) -> Tensor:
    """Attention of the last `window` rows, or of all if there are fewer: (H_kv, G, W, S)."""
    heads, length, width = entries.keys.shape
    queries = entries.queries[:, -window:].float()
    # With four dimensions, matmul would copy the keys.
    rows = rearrange(queries, "(h g) w d -> h (g w) d", h=heads)
    scaling = getattr(entries.attention, "scaling", width**-0.5)
    logits = (rows @ entries.keys.float().mT).mul_(scaling)
    logits = rearrange(logits, "h (g w) s -> h g w s", w=queries.shape[1])
    asked = torch.arange(length, device=logits.device)[-window:]
    hidden = ~entries.sight.seen(asked, length)
    return logits.masked_fill_(hidden, -torch.inf).softmax(-1)


def small_keys(entries: CacheEntries) -> Tensor:
    """The negative L2 norm of keys."""
    return -entries.keys.float().norm(dim=-1)


def received(entries: CacheEntries) -> Tensor:
    """Attention received from all rows of the prompt, the same for all heads."""
    return entries.signals[ReceivedInLayer(entries.layer)].float().expand(len(entries.keys), -1)


def scores_of(press: Press, entries: CacheEntries) -> Tensor:
    """What a press of kvpress finds.

    Raises:
        MethodFieldError: it returned something else than scores.
    """
    cos, sin = entries.rotary
    scores = press.score(
        entries.attention,
        entries.hidden[None],
        entries.keys[None],
        entries.values[None],
        None,
        {"position_embeddings": (cos[None], sin[None])},
    )
    wanted = (1, *entries.keys.shape[:2])
    if not isinstance(scores, Tensor) or tuple(scores.shape) != wanted:
        got = f"shape {tuple(scores.shape)}" if isinstance(scores, Tensor) else repr(scores)
        raise MethodFieldError(
            f"press={type(press).__name__} returned {got} from score(): it must be a tensor of "
            f"shape {wanted}, (1, key heads, entries)."
        )
    return scores[0]

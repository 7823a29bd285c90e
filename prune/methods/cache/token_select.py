"""TokenSelect: each new token attends to the entries that its heads vote for, and drops none.

Reference: TokenSelect: Efficient Long-Context Inference and Length Extrapolation for LLMs via
    Dynamic Token-Level KV Cache Selection, EMNLP 2025, arXiv 2411.02886.
Upstream: pzs19/TokenSelect, patcher/token_retrieval.py (TokenRetriever.retrieval_indices,
    get_topk_tokens), commit 8e1e97f03e4e37f38f3dd15d1987fa59e80cdb43.
Differs: query head h is compared with the keys that it attends to, those of head h // group. The
    official kernel takes head h % key heads.
    A budget replaces `top_k`, for every row of a batch (official: one request at a time).
    Only new tokens select; the chunks of a long prompt, whose queries the official code averages,
    attend to everything. The switch that re-uses a selection, off as published, is left out.
    Scores are float32 and ties go to the lower index (official: bfloat16, ties open).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from einops import rearrange
from torch import Tensor
from torch.nn.functional import max_pool1d

from ...contract import Attending
from ...errors import MethodFieldError
from ...fields import check_int
from ...ops.parts import on_device
from ...ops.topk import top_k
from ...registry import register


@register("token_select")
@dataclass(frozen=True, kw_only=True)
class TokenSelect(Attending):
    """The first `n_init` entries, the last `n_local` and the `top_k` between them with most votes.

    A vote is a head's softmax over the entries between, without the usual scale. `pool` is the
    width of a maximum over neighbours that votes may pass; 1 leaves them as they are.
    """

    unranked: ClassVar[str | None] = "drops nothing: every new token ranks all entries anew"
    retired: ClassVar[Mapping[str, object]] = {"official": False}

    n_init: int = 128
    n_local: int = 512
    top_k: int = 2048
    pool: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_int("n_init", self.n_init, at_least=0, hint="give a number of entries, at least 0")
        hint = "give a number of entries, at least 1, as the new token is one of them"
        check_int("n_local", self.n_local, at_least=1, hint=hint)
        check_int("top_k", self.top_k, at_least=1, hint="give a number of entries, at least 1")
        hint = "give an odd number of neighbours (1 for none)"
        check_int("pool", self.pool, at_least=1, hint=hint)
        if self.pool % 2 == 0:
            raise MethodFieldError(f"pool={self.pool} is not possible: {hint}.")

    @property
    def always(self) -> int:
        return self.n_init + self.n_local

    def attended(
        self, query: Tensor, keys: Tensor, valid: Tensor | None, keep: Tensor | None
    ) -> tuple[Tensor, Tensor | None] | None:
        # The values of `keep` decide the shape of the result.
        fixed, stored = self.always, keys.shape[2]
        wanted = [self.top_k] if keep is None else (keep - fixed).clamp_min(1).tolist()
        if fixed + min(wanted) >= stored:
            return None
        column = torch.arange(stored, device=keys.device)
        if valid is None and len(set(wanted)) == 1:  # all rows alike: nothing to mask
            votes = self._votes(query, keys[:, :, self.n_init : stored - self.n_local])
            chosen = top_k(votes, wanted[0]).sort().values + self.n_init
            first, last = column[: self.n_init], column[stored - self.n_local :]
            rows = len(keys)
            return torch.cat([first.expand(rows, -1), chosen, last.expand(rows, -1)], 1), None
        valid = keys.new_ones(len(keys), stored, dtype=torch.bool) if valid is None else valid
        start = (stored - valid.sum(1))[:, None]  # (B, 1), the first entry that is no padding
        between = (column >= start + self.n_init) & (column < stored - self.n_local)
        votes = self._votes(query, keys, between)

        most = min(max(wanted), stored - fixed)
        rank = column[:most]
        room = torch.minimum(on_device(wanted, keys.device)[:, None], between.sum(1, keepdim=True))
        chosen = torch.where(rank < room, top_k(votes, most), -1)
        first = start + column[: self.n_init]
        first = first.masked_fill(first >= stored, -1)
        last = column[stored - self.n_local :]
        last = torch.where(last >= start + self.n_init, last, -1)
        columns = torch.cat([first, chosen, last], 1).sort().values
        return columns.clamp_min(0), columns >= 0

    def _votes(self, query: Tensor, keys: Tensor, between: Tensor | None = None) -> Tensor:
        """The sum of all heads' votes for each entry, or for each in `between`, all others -1:
        (B, S)."""
        logits = _products(self._grouped(query, keys.shape[1]), keys).flatten(1, 2)
        if between is None:
            return self._pooled(logits.softmax(-1).sum(1))
        votes = logits.masked_fill(~between[:, None], -torch.inf).softmax(-1).sum(1)
        votes = votes.masked_fill(~between, -1)  # also where nothing is between, and votes are nan
        return self._pooled(votes).masked_fill(~between, -1)

    def _grouped(self, query: Tensor, key_heads: int) -> Tensor:
        """The query heads (B, H, D) by the head of keys that they attend to: (B, H_kv, G, D)."""
        return rearrange(query, "b (h g) d -> b h g d", h=key_heads)

    def _pooled(self, votes: Tensor) -> Tensor:
        if self.pool == 1:
            return votes
        return max_pool1d(votes[:, None], self.pool, stride=1, padding=self.pool // 2)[:, 0]


def _products(query: Tensor, keys: Tensor) -> Tensor:
    """Inner products of queries (B, H_kv, G, D) with keys (B, H_kv, S, D): (B, H_kv, G, S) float32.

    On a GPU half precision is read as it is; elsewhere torch has no such product.
    """
    if keys.is_cuda and keys.dtype in (torch.bfloat16, torch.float16):
        q, k = rearrange(query, "b h g d -> (b h) g d"), rearrange(keys, "b h s d -> (b h) d s")
        products = torch.bmm(q, k, out_dtype=torch.float32)
        return rearrange(products, "(b h) g s -> b h g s", b=len(keys))
    return query.float() @ keys.float().mT

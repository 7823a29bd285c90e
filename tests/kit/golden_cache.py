"""Golden runners of methods on the KV cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from kit.golden import Golden, Runner, assert_equal
from torch import Tensor
from vlmprune.prune.contract import CacheEntries, ReceivedInLayer
from vlmprune.prune.methods.cache.elastic_cache import ElasticCache
from vlmprune.prune.methods.cache.token_select import TokenSelect
from vlmprune.prune.ops.topk import ascending


def entries_of(
    keys: Tensor,
    values: Tensor,
    *,
    layer: int = 0,
    received: Tensor | None = None,
    queries: Tensor | None = None,
    visual: Tensor | None = None,
    attention: Any = None,
) -> CacheEntries:
    """What a layer stored of a prompt: keys and values (H_kv, S, D_head), the rest as needed."""
    length, width = keys.shape[1:]
    return CacheEntries(
        layer=layer,
        keys=keys,
        values=values,
        queries=keys if queries is None else queries,
        visual=torch.ones(length, dtype=torch.bool) if visual is None else visual,
        signals={} if received is None else {ReceivedInLayer(layer): received},
        attention=attention,
        hidden=torch.zeros(length, 4),
        rotary=(torch.ones(length, width), torch.zeros(length, width)),
    )


@dataclass(frozen=True, kw_only=True)
class OfficialElasticCache(ElasticCache):
    """The ranks of the last candidates are taken for the numbers of those that stay: p stays if
    the p-th lowest score is one of theirs. The numbers of dropped entries lack the start."""

    def _parted(self, scores: Tensor, start: int, count: int) -> tuple[Tensor, Tensor]:
        ranks = scores[start:-1].float().argsort(stable=True).argsort()
        dropped, anchors = ranks.split([len(ranks) - count, count])
        return ascending(anchors) + start, ascending(dropped)

    def slot(self, kept: int, stored: int) -> int:
        return super().slot(kept + 1, stored)  # one more was dropped than counted


@dataclass(frozen=True, kw_only=True)
class OfficialTokenSelect(TokenSelect):
    """Query head h is compared with head h % key heads."""

    def _grouped(self, query: Tensor, key_heads: int) -> Tensor:
        return query.unflatten(1, (-1, key_heads)).transpose(1, 2)


def _elastic_cache(golden: Golden, method: Any) -> None:
    a, params = golden.arrays, golden.params
    keep = a["k_out"].shape[2]
    for layer in range(params["layers"]):
        received = a["attn"][layer].mean(0).sum(0)  # nothing is above the diagonal
        entries = entries_of(a["k"][layer], a["v"][layer], layer=layer, received=received)
        done = method.compress(entries, keep)
        assert_equal(done.kept, a["kept"][layer])
        torch.testing.assert_close(done.keys, a["k_out"][layer])
        torch.testing.assert_close(done.values, a["v_out"][layer])

    stored, lengths, removed = keep, [keep], []
    for seen in range(params["L"] + 1, params["L"] + 1 + len(a["removed"])):
        stored += 1
        over = int(stored - seen * (1 - params["ratio"]))  # as officially, in floating point
        removed.append(method.slot(keep, stored) if over >= 1 else -1)
        stored -= over >= 1
        lengths.append(stored)
    assert removed == a["removed"].tolist()
    assert lengths == a["cache_len"].tolist()


def _token_select(golden: Golden, method: Any) -> None:
    query, keys = golden.arrays["q"].mean(0), golden.arrays["k"].transpose(0, 1)
    valid = torch.ones(1, keys.shape[1], dtype=torch.bool)
    columns, counts = method.attended(query[None], keys[None], valid, None)
    assert_equal(columns[counts], golden.arrays["kept"])


RUNNERS: dict[str, Runner] = {
    "elasticcache": Runner(
        "elastic_cache",
        lambda p: {key: p[key] for key in ("start_size", "distance")},
        _elastic_cache,
        OfficialElasticCache,
    ),
    "tokenselect": Runner(
        "token_select",
        lambda p: {key: p[key] for key in ("n_init", "n_local", "top_k")},
        _token_select,
        OfficialTokenSelect,
    ),
}

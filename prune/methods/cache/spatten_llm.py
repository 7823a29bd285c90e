"""SpAtten-LLM: each head keeps the first entries, the last ones, and those that were scored best.

Reference: SpAtten: Efficient Sparse Attention Architecture with Cascade Token and Head Pruning,
    HPCA 2021, arXiv 2012.09852.
Upstream: mit-han-lab/spatten, spatten_llm/kv_cache_token_pruning.py
    (SpAttenKVCache.apply_token_pruning), commit a0f1388630590668e09456c4680211c513592e3f.
Differs: the prompt is compressed once, behind its prefill (official: between the turns of a
    dialogue, whose caches these methods do not shorten again).
    Scores are the logits of the prompt's last row (official: of the last forward, all rows of a
    chunk summed), averaged over query heads that share keys (official: refused).
    The budget is the number of entries; half of what the start leaves is recent, as published
    (128 of 256), unless a number is given. Where there is no room for both ends, the last entries
    come first.
    Keys keep the rotation of the prompt, and decoding goes on behind what is stored (official:
    un-rotated keys are turned to their slots at every step).
    Scores are float32 and ties go to the lower index (official: the model's dtype, ties open).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

from ...contract import CacheEntries, Compressed, Compressing, ModelShape, Signal
from ...fields import check_int
from ...ops.topk import ascending, top_k
from ...registry import register


@register("spatten_llm")
@dataclass(frozen=True, kw_only=True)
class SpAttenLLM(Compressing):
    """The first `start_size` entries, the last `recent_size`, and each key head's best in between.

    `recent_size`: None takes half of what the start leaves. `coming` shortens it by the number of
    tokens that are about to come.
    """

    start_size: int = 4
    recent_size: int | None = None
    coming: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        hint = "give a number of entries, 0 or more"
        check_int("start_size", self.start_size, at_least=0, hint=hint)
        if self.recent_size is not None:
            check_int("recent_size", self.recent_size, at_least=0, hint=f"{hint}, or None")
        check_int("coming", self.coming, at_least=0, hint="give a number of tokens, 0 or more")

    def needs(self, shape: ModelShape) -> tuple[Signal, ...]:
        return ()

    def compress(self, entries: CacheEntries, keep: int) -> Compressed:
        stored = entries.keys.shape[1]
        start, recent = self._sizes(keep)
        scores = _last_logits(entries)
        best = start + top_k(scores[:, start : stored - recent], keep - start - recent)
        number = torch.arange(stored, device=scores.device)
        ends = torch.cat([number[:start], number[stored - recent :]])
        kept = ascending(torch.cat([ends.expand(len(best), -1), best], 1))
        return Compressed(kept=kept, scores=scores)

    def _sizes(self, keep: int) -> tuple[int, int]:
        """How many entries stay at the start and at the end."""
        recent = self.recent_size
        if recent is None:
            recent = max(1, (keep - self.start_size) // 2)
        recent = min(max(0, recent - self.coming), keep)
        return min(self.start_size, keep - recent), recent


def _last_logits(entries: CacheEntries) -> Tensor:
    """Of the prompt's last row with all keys: (H_kv, S)."""
    keys = entries.keys.float()
    query = rearrange(entries.queries[:, -1].float(), "(h g) d -> h g d", h=len(keys))
    scaling = getattr(entries.attention, "scaling", keys.shape[-1] ** -0.5)
    return (query @ keys.mT).mean(1) * scaling

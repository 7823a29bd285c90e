"""Flash attention without a GPU: its two kernels, computed the slow way in memory, in the place
where transformers keeps those of the flash-attn package. What transformers does around them
(padding taken out and put back, gapped position ids read as packed sequences) is its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers import modeling_flash_attention_utils as utils


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
) -> Tensor:
    """q (B, L, H, D), k and v (B, S, H_kv, D) -> (B, L, H, D); the last query sees all keys."""
    assert q.dtype == k.dtype == v.dtype
    query, key, value = (x.transpose(1, 2).float() for x in (q, k, v))
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    scores = query @ key.mT * (softmax_scale or query.shape[-1] ** -0.5)
    queries, keys = scores.shape[-2:]
    ahead = torch.arange(keys) - torch.arange(keys - queries, keys)[:, None]
    hidden = ahead > 0 if causal else torch.zeros_like(ahead, dtype=torch.bool)
    if window_size[0] >= 0:
        hidden = hidden | (ahead < -window_size[0])
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    return (weights @ value).transpose(1, 2).to(q.dtype)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
) -> Tensor:
    """Sequences one behind the other: q (T, H, D) -> (T, H, D), each attends to itself."""
    sizes = [bounds.diff().tolist() for bounds in (cu_seqlens_q, cu_seqlens_k, cu_seqlens_k)]
    assert [sum(of) for of in sizes] == [len(x) for x in (q, k, v)]
    parts = zip(*(x.split(of) for x, of in zip((q, k, v), sizes, strict=True)), strict=True)
    found = [
        flash_attn_func(*(x[None] for x in part), dropout_p, softmax_scale, causal, window_size)[0]
        for part in parts
    ]
    return torch.cat(found)


@contextmanager
def flash_kernels() -> Iterator[None]:
    """Within it, models in memory run with `attn_implementation="flash_attention_2"`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PreTrainedModel, "_flash_attn_can_dispatch", lambda *args, **kwargs: True)
        for name, value in {
            "_loaded_implementation": "flash_attention_2",
            "_flash_fn": flash_attn_func,
            "_flash_varlen_fn": flash_attn_varlen_func,
            "_flash_with_kvcache_fn": None,
            "_pad_fn": utils._pad_input,
            "_unpad_fn": utils._unpad_input,
            "_process_flash_kwargs_fn": utils._lazy_define_process_function(flash_attn_varlen_func),
            "_process_with_kvcache_kwargs_fn": dict,
        }.items():
            patch.setattr(utils, name, value)
        yield

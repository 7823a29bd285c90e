"""Attention of packed questions: cheaper than one masked map over prefix and questions."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NAME = "packed_prefix"


def packed_prefix(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float,
    prefix: int,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal over the first `prefix` tokens; later rows see what `attention_mask` [B, 1, Q, L]
    (added to the logits) leaves them. Tensors are [B, heads, L, head_dim]."""
    with torch.autocast(query.device.type, enabled=False):
        value = value.to(query.dtype)
        first = F.scaled_dot_product_attention(
            query[:, :, :prefix],
            key[:, :, :prefix],
            value[:, :, :prefix],
            is_causal=True,
            scale=scaling,
        )
        logits = (query[:, :, prefix:] * scaling) @ key.transpose(-1, -2)
        rest = (logits + attention_mask.to(logits.dtype)).softmax(-1) @ value
    return torch.cat([first, rest], dim=2).transpose(1, 2), None

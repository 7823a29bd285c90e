"""Torch's counter of FLOPs, as tests hold our figures against it."""

from __future__ import annotations

import torch
from torch.utils.flop_counter import FlopCounterMode

# Releases of torch before 2.15 count 0 for the fused attention that a CPU runs.
FUSED_ON_A_CPU = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def fused_attention(query, key, value, *args, **kwargs) -> int:
    """FLOPs of `q k^T` and `p v`, from shapes (B, H, L, D); key and value may have fewer heads."""
    return 2 * query[:-1].numel() * key[-2] * (query[-1] + value[-1])


def counting() -> FlopCounterMode:
    return FlopCounterMode(display=False, custom_mapping={FUSED_ON_A_CPU: fused_attention})

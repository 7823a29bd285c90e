"""Attention whose queries, keys and values come out of one module, `qkv`."""

from __future__ import annotations

from typing import Any

from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import linear


def values_alone(attention: Any, rows: Tensor) -> Tensor:
    """Values (B, H, S, D_head) of normed rows (B, S, C), past the hooks of `qkv`.

    Of a plain linear map, which nothing adapts or offloads, only the rows of its weights that make
    values are used: the rest would be two thirds of the products.
    """
    mixed = attention.qkv
    if type(mixed) is nn.Linear and "forward" not in vars(mixed):
        bias = None if mixed.bias is None else mixed.bias.chunk(3)[2]
        values = linear(rows, mixed.weight.chunk(3)[2], bias)
    else:
        values = mixed.forward(rows).chunk(3, -1)[2]
    return rearrange(values, "b s (h d) -> b h s d", h=attention.num_heads)

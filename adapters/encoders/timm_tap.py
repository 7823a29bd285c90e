"""Reading attention of timm's modules, which call the kernel themselves, by hooks around it."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..tap import Listener

Bias = Callable[[Tensor], Tensor | None]


class TimmTap:
    """One attention module that shows its queries and keys, as its kernel gets them, to `listener`
    and adds `bias` to its logits, until `remove()`.

    Args:
        attention: it passes queries and keys through `q_norm` and `k_norm`, which do nothing where
            the model has no such norms, and takes `attn_mask=`.
    """

    def __init__(self, attention: Any, listener: Listener, bias: Bias) -> None:
        self._attention, self._listener, self._bias = attention, listener, bias
        self._own = threading.local()
        self._hooks = [
            attention.register_forward_pre_hook(self._enter, with_kwargs=True),
            attention.q_norm.register_forward_hook(self._queries),
            attention.k_norm.register_forward_hook(self._keys),
        ]

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()

    @torch.compiler.disable
    def _enter(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if kwargs is None:  # another thread takes the hook off
            return None
        self._own.rope = kwargs.get("rope")
        bias = self._bias(args[0])
        return None if bias is None else (args, {**kwargs, "attn_mask": bias})

    @torch.compiler.disable
    def _queries(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self._own.query = output

    @torch.compiler.disable
    def _keys(self, module: nn.Module, args: Any, output: Tensor) -> None:
        own, attention = self._own, self._attention
        query, own.query = getattr(own, "query", None), None
        rope, own.rope = getattr(own, "rope", None), None
        if query is None:  # another thread put the hooks on meanwhile
            return
        key = output
        if rope is not None:
            query, key = self._turned(query, rope), self._turned(key, rope)
        if (groups := getattr(attention, "num_kv_groups", 1)) > 1:
            key = key.repeat_interleave(groups, 1)
        self._listener(query, key, None, attention.scale)

    def _turned(self, heads: Tensor, rope: Tensor) -> Tensor:
        """Queries or keys (B, H, S, D_head), those of patches turned by their positions."""
        attention = self._attention
        turn = sys.modules[type(attention).__module__].apply_rot_embed_cat
        prefix = attention.num_prefix_tokens
        half = getattr(attention, "rotate_half", False)
        patches = turn(heads[:, :, prefix:], rope, half=half)
        return torch.cat([heads[:, :, :prefix], patches], 2).type_as(heads)

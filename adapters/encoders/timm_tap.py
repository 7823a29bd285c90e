"""Reading attention of timm's modules, which call the kernel themselves, by hooks around it."""

from __future__ import annotations

import sys
import threading
from typing import Any

import torch
from torch import Tensor, nn

from ..encoder import Bias
from ..hooks import Uncopied
from ..tap import Exchange, Listener


def mixes(attention: Any) -> bool:
    """Whether one module makes queries, keys and values, so that values can be exchanged behind
    it."""
    return attention.qkv is not None and getattr(attention, "q_bias", None) is None


class TimmTap(Uncopied):
    """One attention module that shows its queries and keys, as its kernel gets them, to `listener`
    and adds `bias` to its logits, until `remove()`.

    Args:
        attention: it passes queries and keys through `q_norm` and `k_norm`, which do nothing where
            the model has no such norms, and takes `attn_mask=`.
        exchange: asked for values; where `mixes` says no, nobody is asked.
    """

    def __init__(self, attention: Any, listener: Listener, exchange: Exchange, bias: Bias) -> None:
        self._attention, self._listener, self._exchange = attention, listener, exchange
        self._bias = bias
        self._own = threading.local()
        self._hooks = [attention.register_forward_pre_hook(self._enter, with_kwargs=True)]
        if mixes(attention):
            self._hooks.append(attention.qkv.register_forward_hook(self._mixed))
        else:
            self._hooks.append(attention.q_norm.register_forward_hook(self._queries))
            self._hooks.append(attention.k_norm.register_forward_hook(self._keys))

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
    def _mixed(self, module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        attention = self._attention
        heads = output.unflatten(-1, (3, attention.num_heads, -1))
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        with torch.no_grad():
            query, key = attention.q_norm(query), attention.k_norm(key)
        self._show(query, key)
        exchanged = self._exchange(query, key, value, None)[2]
        if exchanged is value:
            return None
        others = heads[:, :, :2].flatten(2)
        return torch.cat([others, exchanged.transpose(1, 2).flatten(2)], -1)

    @torch.compiler.disable
    def _queries(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self._own.query = output

    @torch.compiler.disable
    def _keys(self, module: nn.Module, args: Any, output: Tensor) -> None:
        query, self._own.query = getattr(self._own, "query", None), None
        if query is not None:  # else another thread put the hooks on meanwhile
            self._show(query, output)

    def _show(self, query: Tensor, key: Tensor) -> None:
        """Show queries and keys (B, H, S, D_head) behind their norms."""
        attention = self._attention
        rope, self._own.rope = getattr(self._own, "rope", None), None
        with torch.no_grad():
            if rope is not None:
                query, key = self._turned(query, rope), self._turned(key, rope)
            if (groups := getattr(attention, "num_kv_groups", 1)) > 1:
                key = key.repeat_interleave(groups, 1)
        self._listener(query, key, None, attention.scale)

    def _turned(self, heads: Tensor, rope: Tensor) -> Tensor:
        """Queries or keys, those of patches turned by their positions."""
        attention = self._attention
        turn = sys.modules[type(attention).__module__].apply_rot_embed_cat
        prefix = attention.num_prefix_tokens
        half = {"half": True} if getattr(attention, "rotate_half", False) else {}
        patches = turn(heads[:, :, prefix:], rope, **half)
        return torch.cat([heads[:, :, :prefix], patches], 2).type_as(heads)

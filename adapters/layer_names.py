"""What the modules of a decoder layer are called, and what its projected queries hold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerNames:
    """As in Llama, unless a family says otherwise. Attention is `self_attn` in all families, in the
    layers that have it."""

    norm: str = "input_layernorm"
    """Before attention."""
    head_norm: str = "{}_norm"
    """In attention, of queries (`q`) and of keys (`k`), where there is one."""
    mlp: str = "mlp"
    down: str = "down_proj"
    """The last projection of an MLP, which reads its neurons; experts have none that all tokens
    pass."""
    last_norm: str = "norm"
    """Of the text model, behind its last layer."""
    gated: bool = False
    """Whether the projection of a head's queries brings as many gates behind them."""

    def heads(self, attention: Any, name: str, projected: Tensor) -> Tensor:
        """Projected queries ("q") or keys ("k") (B, Q, ...) before they are turned:
        (B, H, Q, D_head)."""
        gates = self.gated and name == "q"
        heads = projected.unflatten(-1, (-1, attention.head_dim * (2 if gates else 1)))
        heads = heads[..., : attention.head_dim]
        norm = getattr(attention, self.head_norm.format(name), None)
        return (heads if norm is None else norm(heads)).transpose(1, 2)


LLAMA = LayerNames()

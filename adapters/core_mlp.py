"""A part of a decoder layer's MLP: some of its neurons, their weights copied, so that a step reads
and multiplies so much less."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import linear

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
"""Of an MLP that can be thinned: `down(act(gate(x)) * up(x))`, plain linear layers."""


@dataclass(frozen=True)
class CoreMLP:
    """A gated MLP of K neurons."""

    act: Callable[[Tensor], Tensor]
    gate: tuple[Tensor, Tensor | None]
    """(K, D), and (K,) of the bias where there is one; so `up`."""
    up: tuple[Tensor, Tensor | None]
    down: tuple[Tensor, Tensor | None]
    """(D, K), (D,)"""

    @classmethod
    def of(cls, mlp: Any, kept: Tensor) -> CoreMLP:
        """The neurons `kept` (K,) of a whole one."""
        kept = kept.to(mlp.down_proj.weight.device)
        down = mlp.down_proj
        return cls(
            act=mlp.act_fn,
            gate=_rows(mlp.gate_proj, kept),
            up=_rows(mlp.up_proj, kept),
            down=(down.weight.detach().index_select(1, kept), down.bias),
        )

    def __call__(self, hidden: Tensor) -> Tensor:
        return linear(self.act(linear(hidden, *self.gate)) * linear(hidden, *self.up), *self.down)


def _rows(part: nn.Linear, kept: Tensor) -> tuple[Tensor, Tensor | None]:
    bias: Tensor | None = part.bias
    own = None if bias is None else bias.detach().index_select(0, kept)
    return part.weight.detach().index_select(0, kept), own


def missing_of(mlp: Any) -> str | None:
    """Why an MLP cannot be thinned, the end of a sentence; None: it can."""
    for name in PROJECTIONS:
        part = getattr(mlp, name, None)
        if part is None:
            return f"has no {name}"
        if type(part) is not nn.Linear:
            return f"has a {type(part).__name__} as {name}, whose rows cannot be copied"
        if getattr(getattr(part, "_hf_hook", None), "offload", False):
            return f"has its {name} offloaded"
    return None if hasattr(mlp, "act_fn") else "has no act_fn"

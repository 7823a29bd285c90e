"""Random signals, for tests and measurements of choosing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How large random signals are, beside their number of tokens or tiles."""

    width: int = 16
    """D"""
    encoder: int = 12
    """C"""
    heads: int = 2
    head_width: int = 6
    clip: int = 8
    """D_clip"""
    text: int = 5
    """T"""
    segments: int = 2
    rows: int = 3
    """R, rows of attention that are asked."""


Draw = Callable[[Any, int, Sizes, torch.Generator], Tensor]
"""(signal, tokens or tiles, sizes, generator) -> a random one."""


def normal(*shape: str) -> Draw:
    """A draw of a shape in the words of `Sizes`, behind the count of tokens; `"-"` first: without
    it."""

    def draw(need: Any, count: int, sizes: Sizes, generator: torch.Generator) -> Tensor:
        named = [getattr(sizes, name) for name in shape if name != "-"]
        size = named if shape[:1] == ("-",) else [count, *named]
        return torch.randn(*size, generator=generator)

    return draw


def shares(need: Any, count: int, sizes: Sizes, generator: torch.Generator) -> Tensor:
    """Positive, of sum 1: (N,)."""
    return torch.randn(count, generator=generator).softmax(0)


def positive(need: Any, count: int, sizes: Sizes, generator: torch.Generator) -> Tensor:
    """(N,) in [0, 1)."""
    return torch.rand(count, generator=generator)


def attention(need: Any, count: int, sizes: Sizes, generator: torch.Generator) -> Tensor:
    """(N,), or (N, H, R) for every head and row."""
    each = (2 * sizes.heads, sizes.rows) if need.each else ()
    return torch.rand(count, *each, generator=generator)


def affinity(need: Any, count: int, sizes: Sizes, generator: torch.Generator) -> Tensor:
    """(N, R) above 1."""
    return 1 + torch.rand(count, sizes.rows, generator=generator)


def waves(need: Any, count: int, sizes: Sizes, generator: torch.Generator) -> Tensor:
    """(N, 2) in [-1, 1)."""
    return 2 * torch.rand(count, 2, generator=generator) - 1


def ranks(need: Any, count: int, sizes: Sizes, generator: torch.Generator) -> Tensor:
    """(N, H) positive, of mean 1."""
    found = torch.rand(count, sizes.heads, generator=generator) + 0.1
    return found / found.mean(0)


def counts(need: Any, count: int, sizes: Sizes, generator: torch.Generator) -> Tensor:
    """(N,) small whole numbers."""
    return torch.randint(9, (count,), generator=generator).float()


def seed(need: Any, count: int, sizes: Sizes, generator: torch.Generator) -> Tensor:
    """0-d."""
    return torch.randint(2**62, (), generator=generator)

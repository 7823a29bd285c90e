"""Random: keep a uniformly random subset of the visual tokens, the floor that methods must beat.

Reference: none; the usual baseline.
Upstream: none.
Differs: the choice depends on `seed` and the image's pixels alone, so an image keeps the same
    tokens in every batch, process and run.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import ClassVar

import torch

from ...contract import (
    BeforeLLM,
    ModelShape,
    Newlines,
    PixelSeed,
    Scope,
    Selection,
    Signal,
    VisualTokens,
)
from ...fields import check_int
from ...ops.topk import ascending
from ...registry import register


@register("random")
@dataclass(frozen=True, kw_only=True)
class Random(BeforeLLM):
    """A random subset of the image, or of each tile. `seed` chooses another one for every image."""

    newline_policies: ClassVar[tuple[Newlines, ...]] = ("compete", "drop", "keep")
    scopes: ClassVar[tuple[Scope, ...]] = ("image", "tile")
    unranked: ClassVar[str | None] = "draws tokens by chance"
    waits: ClassVar[str | None] = (
        "the CPU draws, the same tokens on every device, from a seed of the pixels"
    )
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_int("seed", self.seed, hint="give a whole number")

    def needs(self, shape: ModelShape) -> tuple[Signal, ...]:
        return (PixelSeed(),)

    def select(self, tokens: VisualTokens, keep: int) -> Selection:
        pixel_seed = tokens.signals[PixelSeed()]
        # The CPU generator reads 32 bits of its seed: hash, so that all bits of both count.
        numbers = [self.seed, int(pixel_seed), *([tokens.tile] if tokens.tile else [])]
        digest = hashlib.sha256(",".join(map(str, numbers)).encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:4]))
        kept = torch.randperm(tokens.num_tokens, generator=generator)[:keep]
        return Selection(kept=ascending(kept).to(pixel_seed.device))

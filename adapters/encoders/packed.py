"""Vision transformers that take the patches of all pictures as one sequence, merged behind
the last block."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

from torch import Tensor

from ..encoder import Encoder, EncoderBlock
from .mixed import values_alone


class PackedEncoder(Encoder):
    """
    Args:
        tower: its blocks have `attn.qkv`, `norm1`, `norm2` and `mlp`.
    """

    packed = True

    def __init__(self, tower: Any) -> None:
        self._tower = tower
        self.unit = tower.config.spatial_merge_size**2

    @cached_property
    def blocks(self) -> Sequence[EncoderBlock]:
        return [
            EncoderBlock(block, block.norm1, block.attn, block.norm2, tail=block.mlp)
            for block in self._tower.blocks
        ]

    def values(self, block: EncoderBlock, rows: Tensor) -> Tensor:
        return values_alone(block.attention, block.norm1(rows))

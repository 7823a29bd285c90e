"""CLIP's and SigLIP's vision towers: a batch of pictures of one size."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

from einops import rearrange
from torch import Tensor

from ..encoder import Encoder, EncoderBlock


class ClipEncoder(Encoder):
    """
    Args:
        tower: a `CLIPVisionModel`, a `SiglipVisionModel` or what these hold.
    """

    def __init__(self, tower: Any) -> None:
        self._tower = tower
        self.prefix = int(hasattr(tower.embeddings, "class_embedding"))

    @cached_property
    def blocks(self) -> Sequence[EncoderBlock]:
        return [
            EncoderBlock(
                layer, layer.layer_norm1, layer.self_attn, layer.layer_norm2, tail=layer.mlp
            )
            for layer in self._tower.encoder.layers
        ]

    def values(self, block: EncoderBlock, rows: Tensor) -> Tensor:
        attention = block.attention
        projected = attention.v_proj(block.norm1(rows))
        return rearrange(projected, "b s (h d) -> b h s d", d=attention.head_dim)

"""ViT (and DeiT's weights in it) of `transformers`: CLS and patches."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, ClassVar

from ..encoder import Encoder, EncoderBlock
from .transformers_model import TransformersEncoder, TransformersModel


class VitEncoder(TransformersEncoder):
    """
    Args:
        tower: a `ViTModel`.
    """

    prefix = 1

    def __init__(self, tower: Any) -> None:
        self._tower = tower

    @cached_property
    def blocks(self) -> Sequence[EncoderBlock]:
        return [
            EncoderBlock(
                layer,
                layer.layernorm_before,
                layer.attention,
                layer.layernorm_after,
                # Asked twice in a layer; only behind the second norm it is the tail.
                tail=layer.dropout,
            )
            for layer in self._tower.layers
        ]


class Vit(TransformersModel):
    library = "transformers.models."
    classes: ClassVar = {"ViTModel": "", "ViTForImageClassification": "vit"}

    @cached_property
    def encoder(self) -> Encoder:
        return VitEncoder(self.tower)

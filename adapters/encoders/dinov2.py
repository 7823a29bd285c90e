"""DINOv2 of `transformers`: layer scale, a mean over patches beside CLS."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, ClassVar

from ..encoder import Encoder, EncoderBlock
from .transformers_model import TransformersEncoder, TransformersModel


class Dinov2Encoder(TransformersEncoder):
    """
    Args:
        tower: a `Dinov2Model`.
    """

    prefix = 1

    def __init__(self, tower: Any) -> None:
        self._tower = tower

    @cached_property
    def blocks(self) -> Sequence[EncoderBlock]:
        return [
            # A dropped path is asked twice in a layer; only behind `norm2` it is the tail.
            EncoderBlock(layer, layer.norm1, layer.attention, layer.norm2, tail=layer.drop_path)
            for layer in self._tower.encoder.layer
        ]


class Dinov2(TransformersModel):
    library = "transformers.models."
    classes: ClassVar = {"Dinov2Model": "", "Dinov2ForImageClassification": "dinov2"}
    means: ClassVar = {"Dinov2ForImageClassification"}
    crops = True

    @cached_property
    def encoder(self) -> Encoder:
        return Dinov2Encoder(self.tower)

    @property
    def fixed_grid(self) -> None:  # it takes any size
        return None

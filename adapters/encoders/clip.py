"""CLIP's and SigLIP's vision towers: a batch of pictures of one size."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, ClassVar

from torch import Tensor

from ..encoder import Encoder, EncoderBlock
from ..image_model import Keywords
from .transformers_model import TransformersEncoder, TransformersModel


class ClipEncoder(TransformersEncoder):
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


class ClipModel(TransformersModel):
    """CLIP and SigLIP without an LLM: the text encoder beside it, if any, is left alone."""

    library = "transformers.models."
    classes: ClassVar = {
        "CLIPVisionModel": "",
        "CLIPVisionModelWithProjection": "vision_model",
        "CLIPModel": "vision_model",
        "CLIPForImageClassification": "vision_model",
        "SiglipVisionModel": "",
        "SiglipModel": "vision_model",
        "SiglipForImageClassification": "vision_model",
    }
    means: ClassVar = {"CLIPForImageClassification", "SiglipForImageClassification"}

    def __init__(self, model: Any, found: str) -> None:
        super().__init__(model, found)
        self.crops = found.startswith("CLIP")

    @cached_property
    def encoder(self) -> Encoder:
        return ClipEncoder(self.tower)

    @property
    def attention_pool(self) -> Any:
        head = getattr(self.tower, "head", None)
        return None if head is None else head.attention

    def biased(self, kwargs: Keywords, bias: Tensor, rows: Tensor) -> Keywords:
        return {**kwargs, "key_padding_mask": bias[:, 0, 0]}

"""timm's `Eva`: EVA-02, Perception Encoders, DINOv3; blocks that turn rows by their positions."""

from __future__ import annotations

from functools import cached_property
from typing import Any, ClassVar

from torch import Tensor

from ..encoder import Encoder
from .timm_vit import TimmEncoder, TimmVit


class EvaEncoder(TimmEncoder):
    def follow(self, kwargs: dict[str, Any], places: Tensor) -> dict[str, Any]:
        """Rotary tables are (N, D), or (H, N, D) where each head has its own: of the rows left,
        (B, 1 | H, K, D)."""
        rope = kwargs.get("rope")
        if rope is None:
            return kwargs
        places = places.to(rope.device)
        own = rope[..., places, :]
        return {**kwargs, "rope": own[:, None] if rope.dim() == 2 else own.transpose(0, 1)}


class TimmEva(TimmVit):
    classes: ClassVar = {"Eva": ""}

    @cached_property
    def encoder(self) -> Encoder:
        return EvaEncoder(self.tower)

    @property
    def rotary(self) -> bool:
        return self.tower.rope is not None

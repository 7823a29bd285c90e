"""LLaVA in the layout of 1.5: one image, one CLIP or SigLIP grid, a two-layer projector."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ...prune.contract import Tower
from ...prune.errors import UnsupportedModelError
from ..family import Family, Grids, Model

_TOWERS = ("clip_vision_model", "siglip_vision_model")


class Llava(Family):
    name = "llava"
    fit = "crop"  # CLIP processors cut the centre out

    def vision_tower(self, model: Model) -> Any:
        return self.core(model).vision_tower

    def vision_attention(self, model: Model) -> Sequence[Any]:
        return [layer.self_attn for layer in self.vision_tower(model).encoder.layers]

    def tower(self, model: Model) -> Tower:
        tower = self.vision_tower(model)
        return Tower(
            num_layers=tower.config.num_hidden_layers,
            has_cls=hasattr(tower.embeddings, "class_embedding"),
        )

    def grids(self, model: Model, features: Sequence[Tensor], inputs: Mapping[str, Any]) -> Grids:
        config = self.vision_tower(model).config
        _, _, height, width = inputs["pixel_values"].shape
        return [(height // config.patch_size, width // config.patch_size)] * len(features)

    def pixels(self, model: Model, inputs: Mapping[str, Any]) -> Sequence[Tensor]:
        return list(inputs["pixel_values"])

    def per_image(
        self,
        model: Model,
        scores: Tensor,
        features: Sequence[Tensor],
        inputs: Mapping[str, Any],
    ) -> Sequence[Tensor]:
        return list(scores[:, 1:] if self.tower(model).has_cls else scores)

    def fixed_tokens(self, model: Model) -> int | None:
        config = self.vision_tower(model).config
        return (config.image_size // config.patch_size) ** 2

    def check(self, model: Model) -> None:
        kind = self.vision_tower(model).config.model_type
        if kind not in _TOWERS:
            raise UnsupportedModelError(
                f"LLaVA with a {kind!r} vision tower is not supported: use one of "
                f"{', '.join(_TOWERS)}."
            )
        strategy = model.config.vision_feature_select_strategy
        wanted = "default" if self.tower(model).has_cls else "full"
        if strategy != wanted:
            raise UnsupportedModelError(
                f"vision_feature_select_strategy={strategy!r} does not fit the {kind!r} tower, "
                f"whose patch grid is what is left by {wanted!r}: set "
                f"model.config.vision_feature_select_strategy = {wanted!r}."
            )

"""Qwen2.5-VL: windowed ViT on packed patches, 2 x 2 merger, M-RoPE decoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ...prune.contract import Tower
from ..family import Family, Grids, Model


class Qwen25VL(Family):
    name = "qwen2_5_vl"
    mrope = True

    def vision_tower(self, model: Model) -> Any:
        return self.core(model).visual

    def vision_attention(self, model: Model) -> Sequence[Any]:
        return [block.attn for block in self.vision_tower(model).blocks]

    def tower(self, model: Model) -> Tower:
        tower = self.vision_tower(model)
        return Tower(
            num_layers=tower.config.depth,
            has_cls=False,
            merge_unit=tower.spatial_merge_unit,
            full_attention=tuple(sorted(tower.fullatt_block_indexes)),
        )

    def grids(self, model: Model, features: Sequence[Tensor], inputs: Mapping[str, Any]) -> Grids:
        merge = self.vision_tower(model).spatial_merge_size
        return [(t * h // merge, w // merge) for t, h, w in inputs["image_grid_thw"].tolist()]

    def pixels(self, model: Model, inputs: Mapping[str, Any]) -> Sequence[Tensor]:
        return inputs["pixel_values"].split(inputs["image_grid_thw"].prod(-1).tolist())

    def per_image(
        self,
        model: Model,
        scores: Tensor,
        features: Sequence[Tensor],
        inputs: Mapping[str, Any],
    ) -> Sequence[Tensor]:
        # The blocks run in window order; `window_index[i]` is the token at place i.
        from transformers.vision_utils import get_vision_window_index

        tower = self.vision_tower(model)
        window_index, _ = get_vision_window_index(
            inputs["image_grid_thw"],
            spatial_merge_size=tower.spatial_merge_size,
            window_size=tower.window_size,
            patch_size=tower.patch_size,
        )
        tokens = scores.flatten().view(-1, tower.spatial_merge_unit).mean(1)
        tokens = tokens[window_index.to(tokens.device).argsort()]
        return tokens.split([len(f) for f in features])

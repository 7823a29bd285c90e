"""Qwen2.5-VL: windowed ViT on packed patches, 2 x 2 merger, M-RoPE decoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ...prune.contract import Tower
from ...prune.tiling import Tiling
from ..family import Family, Inputs, Modality, Model


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

    def tilings(
        self, model: Model, modality: Modality, features: Sequence[Tensor], inputs: Inputs
    ) -> Sequence[Tiling]:
        return [Tiling.single(*grid) for (grid,) in self.pictures(model, modality, inputs)]

    def pixels(self, model: Model, modality: Modality, inputs: Inputs) -> Sequence[Tensor]:
        return inputs["pixel_values"].split(inputs["image_grid_thw"].prod(-1).tolist())

    def pictures(
        self, model: Model, modality: Modality, inputs: Inputs
    ) -> Sequence[Sequence[tuple[int, int]]]:
        merge = self.vision_tower(model).spatial_merge_size
        return [[(t * h // merge, w // merge)] for t, h, w in inputs["image_grid_thw"].tolist()]

    def encoder_features(self, model: Model, output: Any, inputs: Inputs) -> Tensor:
        hidden: Tensor = output.last_hidden_state[None]
        return hidden

    def project(self, model: Model, rows: Tensor) -> Tensor:
        merger = self.vision_tower(model).merger
        projected: Tensor = merger(rows.reshape(-1, merger.ln_q.weight.shape[0]))
        return projected

    def per_image(
        self, model: Model, modality: Modality, values: Tensor, inputs: Inputs
    ) -> Sequence[Tensor]:
        return [unit.mean(1) for unit in self._units(model, values, inputs)]

    def merged_patches(
        self, model: Model, modality: Modality, values: Tensor, inputs: Inputs
    ) -> Sequence[Tensor]:
        return [unit.flatten(1) for unit in self._units(model, values, inputs)]

    def _units(self, model: Model, values: Tensor, inputs: Inputs) -> Sequence[Tensor]:
        """The patches behind each token, per image: (P, merge_unit, ...).

        The blocks run in window order; `window_index[i]` is the token at place i.
        """
        from transformers.vision_utils import get_vision_window_index

        tower = self.vision_tower(model)
        window_index, _ = get_vision_window_index(
            inputs["image_grid_thw"],
            spatial_merge_size=tower.spatial_merge_size,
            window_size=tower.window_size,
            patch_size=tower.patch_size,
        )
        units = values.flatten(0, 1).unflatten(0, (-1, tower.spatial_merge_unit))
        units = units[window_index.to(units.device).argsort()]
        counts = inputs["image_grid_thw"].prod(-1) // tower.spatial_merge_unit
        return units.split(counts.tolist())

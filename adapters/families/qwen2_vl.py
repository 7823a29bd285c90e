"""Qwen2-VL: packed patches of any size, 2 x 2 merger, M-RoPE decoder, videos."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor

from ...prune.contract import Tower
from ...prune.tiling import Block, Tiling
from ..family import IMAGE, VIDEO, Family, Inputs, Modality, Model


class Qwen2VL(Family):
    name = "qwen2_vl"
    modalities: ClassVar[tuple[Modality, ...]] = (IMAGE, VIDEO)
    mrope = True

    def vision_tower(self, model: Model) -> Any:
        return self.core(model).visual

    def vision_attention(self, model: Model) -> Sequence[Any]:
        return [block.attn for block in self.vision_tower(model).blocks]

    def tower(self, model: Model) -> Tower:
        config = self.vision_tower(model).config
        return Tower(
            num_layers=config.depth,
            has_cls=False,
            merge_unit=config.spatial_merge_size**2,
        )

    def tilings(
        self, model: Model, modality: Modality, features: Sequence[Tensor], inputs: Inputs
    ) -> Sequence[Tiling]:
        """A block per frame: the encoder sees each on its own, as two pictures in one."""
        return [
            Tiling(tuple(Block((rows,), (columns,)) for rows, columns in frames))
            for frames in self.pictures(model, modality, inputs)
        ]

    def pixels(self, model: Model, modality: Modality, inputs: Inputs) -> Sequence[Tensor]:
        sizes = inputs[self.sizes(modality)].prod(-1).tolist()
        return inputs[modality.pixels].split(sizes)

    def pictures(
        self, model: Model, modality: Modality, inputs: Inputs
    ) -> Sequence[Sequence[tuple[int, int]]]:
        merge = self.vision_tower(model).config.spatial_merge_size
        sizes = inputs[self.sizes(modality)].tolist()
        return [[(rows // merge, columns // merge)] * frames for frames, rows, columns in sizes]

    def encoder_features(self, model: Model, output: Any, inputs: Inputs) -> Tensor:
        hidden: Tensor = output.last_hidden_state[None]
        return hidden

    def project(self, model: Model, rows: Tensor) -> Tensor:
        patches = rows.view(len(rows) * self.tower(model).merge_unit, -1)
        projected: Tensor = self.vision_tower(model).merger(patches)
        return projected

    def per_image(
        self, model: Model, modality: Modality, values: Tensor, inputs: Inputs
    ) -> Sequence[Tensor]:
        return [unit.mean(1) for unit in self._units(model, modality, values, inputs)]

    def merged_patches(
        self, model: Model, modality: Modality, values: Tensor, inputs: Inputs
    ) -> Sequence[Tensor]:
        return [unit.flatten(1) for unit in self._units(model, modality, values, inputs)]

    def sizes(self, modality: Modality) -> str:
        """Frames, rows and columns of patches of each image: (images, 3)."""
        return f"{modality.name}_grid_thw"

    def in_order(self, model: Model, units: Tensor, sizes: Tensor) -> Tensor:
        """Units as the blocks see them (P, ...) in the order of the prompt."""
        return units

    def _units(
        self, model: Model, modality: Modality, values: Tensor, inputs: Inputs
    ) -> Sequence[Tensor]:
        """The patches behind each token, per image: (P, merge_unit, ...)."""
        unit = self.tower(model).merge_unit
        sizes = inputs[self.sizes(modality)]
        units = self.in_order(model, values.flatten(0, 1).unflatten(0, (-1, unit)), sizes)
        return units.split((sizes.prod(-1) // unit).tolist())

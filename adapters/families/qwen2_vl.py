"""Qwen2-VL: packed patches of any size, 2 x 2 merger, M-RoPE decoder, videos."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, ClassVar

from einops import rearrange
from torch import Tensor

from ...prune.contract import Tower
from ...prune.tiling import Block, Tiling
from ..encoder import Encoder
from ..encoders.packed import PackedEncoder
from ..family import IMAGE, VIDEO, Call, Family, Modality


class Qwen2VL(Family):
    name = "qwen2_vl"
    modalities: ClassVar[tuple[Modality, ...]] = (IMAGE, VIDEO)
    mrope = True

    @property
    def vision_tower(self) -> Any:
        return self.core.visual

    @property
    def vision_attention(self) -> Sequence[Any]:
        return [block.attn for block in self.vision_tower.blocks]

    @property
    def tower(self) -> Tower:
        config = self.vision_tower.config
        return Tower(
            num_layers=config.depth,
            has_cls=False,
            merge_unit=config.spatial_merge_size**2,
            rotary=True,
        )

    @cached_property
    def encoder(self) -> Encoder:
        return PackedEncoder(self.vision_tower)

    @property
    def projectors(self) -> Sequence[Any]:
        return [self.vision_tower.merger]

    def tilings(self, call: Call, features: Sequence[Tensor]) -> Sequence[Tiling]:
        """A block per frame: the encoder sees each on its own, as two pictures in one."""
        return [
            Tiling(tuple(Block((rows,), (columns,)) for rows, columns in frames))
            for frames in self.pictures(call)
        ]

    def pixels(self, call: Call) -> Sequence[Tensor]:
        sizes = call.inputs[self.sizes(call.modality)].prod(-1).tolist()
        return call.inputs[call.modality.pixels].split(sizes)

    def pictures(self, call: Call) -> Sequence[Sequence[tuple[int, int]]]:
        merge = self.vision_tower.config.spatial_merge_size
        sizes = call.inputs[self.sizes(call.modality)].tolist()
        return [[(rows // merge, columns // merge)] * frames for frames, rows, columns in sizes]

    def encoder_features(self, call: Call, output: Any) -> Tensor:
        hidden: Tensor = output.last_hidden_state[None]
        return hidden

    def project(self, rows: Tensor) -> Tensor:
        patches = rearrange(rows, "n (u c) -> (n u) c", u=self.tower.merge_unit)
        projected: Tensor = self.vision_tower.merger(patches)
        return projected

    def per_image(self, call: Call, values: Tensor) -> Sequence[Tensor]:
        return [unit.mean(1) for unit in self._units(call, values)]

    def merged_patches(self, call: Call, values: Tensor) -> Sequence[Tensor]:
        return [unit.flatten(1) for unit in self._units(call, values)]

    def sizes(self, modality: Modality) -> str:
        """Frames, rows and columns of patches of each image: (images, 3)."""
        return f"{modality.name}_grid_thw"

    def in_order(self, units: Tensor, sizes: Tensor) -> Tensor:
        """Units as the blocks see them (P, ...) in the order of the prompt."""
        return units

    def _units(self, call: Call, values: Tensor) -> Sequence[Tensor]:
        """The patches behind each token, per image: (P, merge_unit, ...)."""
        unit = self.tower.merge_unit
        sizes = call.inputs[self.sizes(call.modality)]
        units = self.in_order(rearrange(values, "b (n u) ... -> (b n) u ...", u=unit), sizes)
        return units.split((sizes.prod(-1) // unit).tolist())

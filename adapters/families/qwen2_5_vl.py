"""Qwen2.5-VL: Qwen2-VL with windows in most layers of its ViT."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor
from transformers.vision_utils import get_vision_window_index

from ...prune.contract import Tower
from .qwen2_vl import Qwen2VL


class Qwen25VL(Qwen2VL):
    name = "qwen2_5_vl"

    @property
    def tower(self) -> Tower:
        full = self.vision_tower.fullatt_block_indexes
        return replace(super().tower, full_attention=tuple(sorted(full)))

    def in_order(self, units: Tensor, sizes: Tensor) -> Tensor:
        """The blocks run in window order; `window_index[i]` is the token at place i."""
        tower = self.vision_tower
        window_index, _ = get_vision_window_index(
            sizes,
            spatial_merge_size=tower.spatial_merge_size,
            window_size=tower.window_size,
            patch_size=tower.patch_size,
        )
        return units[window_index.to(units.device).argsort()]

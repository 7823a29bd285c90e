"""Command A Vision: SigLIP tiles and the whole picture last; full layers have no positions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...prune.contract import Tower
from ..family import Call
from ..tiled import Tiled


class Cohere2Vision(Tiled):
    name = "cohere2_vision"

    @property
    def vision_tower(self) -> Any:
        return self.core.vision_tower

    @property
    def vision_attention(self) -> Sequence[Any]:
        return [layer.self_attn for layer in self.vision_tower.encoder.layers]

    @property
    def tower(self) -> Tower:
        depth = self.vision_tower.config.num_hidden_layers
        return Tower(num_layers=depth, has_cls=False, merge_unit=self.step**2)

    @property
    def projectors(self) -> Sequence[Any]:
        return [self.core.multi_modal_projector]

    @property
    def step(self) -> int:
        return int(self.model.config.downsample_factor)

    def separates(self, gap: Sequence[int], behind: Sequence[int]) -> bool:
        """A line break follows every tile; between images are two marks more."""
        return len(gap) > 1

    def pooled(self, call: Call, images: Sequence[Tensor], kind: type) -> Tensor:
        rows, columns = self.grid(call)
        return torch.cat(list(images)).unflatten(0, (-1, rows * columns))

    def encoder_features(self, call: Call, output: Any) -> Tensor:
        hidden: Tensor = output.last_hidden_state
        return hidden

    def project(self, rows: Tensor) -> Tensor:
        projector = self.core.multi_modal_projector
        own, gate = projector.linear_1(rows).chunk(2, dim=-1)
        projected: Tensor = projector.linear_2(projector.act(gate) * own)
        return projected

    def rotates(self, layer: int) -> bool:
        """Layers without a window have no positions at all."""
        return bool(self.text_model.config.layer_types[layer] == "sliding_attention")

"""Command A Vision: SigLIP tiles and the whole picture last; full layers have no positions."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..tiled import Tiled


class Cohere2Vision(Tiled):
    name = "cohere2_vision"

    @property
    def step(self) -> int:
        return int(self.model.config.downsample_factor)

    def separates(self, gap: Sequence[int], behind: Sequence[int]) -> bool:
        """A line break follows every tile; between images are two marks more."""
        return len(gap) > 1

    def project(self, rows: Tensor) -> Tensor:
        projector = self.core.multi_modal_projector
        own, gate = projector.linear_1(rows).chunk(2, dim=-1)
        projected: Tensor = projector.linear_2(projector.act(gate) * own)
        return projected

    def rotates(self, layer: int) -> bool:
        """Layers without a window have no positions at all."""
        return bool(self.text_model.config.layer_types[layer] == "sliding_attention")

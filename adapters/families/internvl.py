"""InternVL 3 and 3.5: tiles and a thumbnail behind them, 2 x 2 patches shuffled into a token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from ...prune.contract import Tower
from ...prune.errors import UnsupportedModelError
from ..family import Call
from ..tiled import Tiled


class InternVL(Tiled):
    name = "internvl"

    @property
    def vision_attention(self) -> Sequence[Any]:
        return [layer.attention for layer in self.vision_tower.encoder.layer]

    @property
    def tower(self) -> Tower:
        return replace(super().tower, has_cls=True, prefix=1)

    @property
    def step(self) -> int:
        return round(1 / self.model.config.downsample_ratio)

    def separates(self, gap: Sequence[int], behind: Sequence[int]) -> bool:
        """Tiles of an image follow one another; frames of a video have text between them."""
        return bool(gap)

    def encoder_features(self, call: Call, output: Any) -> Tensor:
        layer = call.inputs.get("vision_feature_layer")
        layer = self.model.config.vision_feature_layer if layer is None else layer
        read: Tensor = output.last_hidden_state if layer == -1 else output.hidden_states[layer]
        return read

    def project(self, rows: Tensor) -> Tensor:
        projected: Tensor = self.core.multi_modal_projector(rows[None])[0]
        return projected

    def check(self) -> None:
        """A CLS row that is kept as a token, and projectors that read several layers."""
        config = self.model.config
        if config.vision_feature_select_strategy != "default":
            raise UnsupportedModelError(
                f"vision_feature_select_strategy={config.vision_feature_select_strategy!r}: the "
                f"rows of InternVL's tiles are squares without CLS: set "
                f'model.config.vision_feature_select_strategy = "default".'
            )
        if not isinstance(config.vision_feature_layer, int):
            raise UnsupportedModelError(
                f"vision_feature_layer={config.vision_feature_layer!r}: transformers reads one "
                f"layer of InternVL's encoder: set model.config.vision_feature_layer = -1."
            )

"""Families whose projector makes one token of several patches of its encoder."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..prune.contract import Tower
from .family import Call, Family


class Merged(Family):
    """A token is made of `step` x `step` patches of an encoder without CLS; what is read of these
    is averaged over them."""

    @property
    @abstractmethod
    def step(self) -> int:
        """Rows and columns of patches behind a token."""

    @abstractmethod
    def units(self, call: Call, values: Tensor) -> Sequence[Tensor]:
        """The values of the patches behind each token, per image: (P, step * step, ...).

        Args:
            values: as of `per_image`.
        """

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

    def encoder_features(self, call: Call, output: Any) -> Tensor:
        hidden: Tensor = output.last_hidden_state
        return hidden

    def per_image(self, call: Call, values: Tensor) -> Sequence[Tensor]:
        return [unit.mean(1) for unit in self.units(call, values)]

    def merged_patches(self, call: Call, values: Tensor) -> Sequence[Tensor]:
        return [unit.flatten(1) for unit in self.units(call, values)]

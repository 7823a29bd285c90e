"""PaliGemma (1 and 2): one SigLIP square; picture and question see each other both ways."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...prune.errors import UnsupportedModelError
from ..both_ways import BothWays
from ..family import Call, Inputs
from .llava import Llava


class PaliGemma(Llava):
    name = "paligemma"
    fit = "stretch"
    makes_masks = True

    def both_ways(self, inputs: Inputs) -> BothWays | None:
        """All that is no answer: the model says so where it is told what is one."""
        kinds = inputs.get("token_type_ids")
        if kinds is None:
            return None
        return BothWays(torch.where(kinds == 0, 0, -1), windowed=False)

    def encoder_features(self, call: Call, output: Any) -> Tensor:
        hidden: Tensor = output.last_hidden_state
        return hidden

    def unread_layers(self, inputs: Inputs) -> Sequence[Any]:
        return ()

    def check(self) -> None:
        """Towers other than SigLIP's."""
        kind = self.vision_tower.config.model_type
        if kind != "siglip_vision_model":
            raise UnsupportedModelError(
                f"{type(self.model).__name__} with a {kind!r} vision tower is not supported: use a "
                f"siglip_vision_model."
            )

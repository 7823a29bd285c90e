"""LLaVA in the layout of 1.5: one image, one CLIP or SigLIP grid, a two-layer projector."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...prune.contract import Tower
from ...prune.errors import UnsupportedModelError
from ...prune.tiling import Tiling
from ..encoder import Encoder
from ..encoders.clip import ClipEncoder
from ..family import Call, Family, Fit, Inputs

_TOWERS = ("clip_vision_model", "siglip_vision_model")


class Llava(Family):
    name = "llava"
    fit: ClassVar[Fit] = "crop"  # CLIP processors cut the centre out

    @property
    def vision_tower(self) -> Any:
        return self.core.vision_tower

    @property
    def vision_attention(self) -> Sequence[Any]:
        return [layer.self_attn for layer in self.vision_tower.encoder.layers]

    @property
    def tower(self) -> Tower:
        tower = self.vision_tower
        return Tower(
            num_layers=tower.config.num_hidden_layers,
            has_cls=hasattr(tower.embeddings, "class_embedding"),
            # CLIP's space lies behind one of its layers, not behind several side by side.
            text_twin=tower.config.model_type == "clip_vision_model"
            and len(self._feature_layers({})) == 1,
            prefix=int(hasattr(tower.embeddings, "class_embedding")),
            blocks_read=tower.config.num_hidden_layers - len(self.unread_layers({})),
        )

    @cached_property
    def encoder(self) -> Encoder:
        return ClipEncoder(self.vision_tower)

    @property
    def projectors(self) -> Sequence[Any]:
        return [self.core.multi_modal_projector]

    def tilings(self, call: Call, features: Sequence[Tensor]) -> Sequence[Tiling]:
        return [Tiling.single(*grid) for (grid,) in self.pictures(call)]

    def pixels(self, call: Call) -> Sequence[Tensor]:
        return call.inputs[call.modality.pixels].split(1)

    def pictures(self, call: Call) -> Sequence[Sequence[tuple[int, int]]]:
        """One of each image (B, 3, H, W), one of each frame of a video (B, T, 3, H, W)."""
        patch = self.vision_tower.config.patch_size
        images, *frames, _, height, width = call.inputs[call.modality.pixels].shape
        return [[(height // patch, width // patch)] * math.prod(frames)] * images

    def encoder_features(self, call: Call, output: Any) -> Tensor:
        layers = self._feature_layers(call.inputs)
        return torch.cat([output.hidden_states[layer] for layer in layers], dim=-1)

    def unread_layers(self, inputs: Inputs) -> Sequence[Any]:
        layers = self.vision_tower.encoder.layers
        states = range(len(layers) + 1)  # the embeddings, then the output of each layer
        try:
            deepest = max(states[layer] for layer in self._feature_layers(inputs))
        except IndexError:  # the model says what is wrong with it
            return ()
        return list(layers[deepest:])

    def _feature_layers(self, inputs: Inputs) -> Sequence[int]:
        """The hidden states that the projector reads, as the call or the model says."""
        layers = inputs.get("vision_feature_layer")
        layers = self.model.config.vision_feature_layer if layers is None else layers
        return [layers] if isinstance(layers, int) else list(layers)

    def project(self, rows: Tensor) -> Tensor:
        projected: Tensor = self.core.multi_modal_projector(rows[None])[0]
        return projected

    def per_image(self, call: Call, values: Tensor) -> Sequence[Tensor]:
        return list(self.patches(values))

    def patches(self, values: Tensor) -> Tensor:
        """Values without those of CLS: (B, P, ...)."""
        return values[:, 1:] if self.tower.has_cls else values

    @property
    def fixed_tokens(self) -> int | None:
        return self.side**2

    @property
    def side(self) -> int:
        """Rows and columns of patches of one tile."""
        config = self.vision_tower.config
        return int(config.image_size // config.patch_size)

    def check(self) -> None:
        """Towers other than CLIP's and SigLIP's, and a CLS row that is kept as a token."""
        kind = self.vision_tower.config.model_type
        if kind not in _TOWERS:
            raise UnsupportedModelError(
                f"{type(self.model).__name__} with a {kind!r} vision tower is not supported: "
                f"use one of {', '.join(_TOWERS)}."
            )
        strategy = self.model.config.vision_feature_select_strategy
        wanted = "default" if self.tower.has_cls else "full"
        if strategy != wanted:
            raise UnsupportedModelError(
                f"vision_feature_select_strategy={strategy!r} does not fit the {kind!r} tower, "
                f"whose patch grid is what is left by {wanted!r}: set "
                f"model.config.vision_feature_select_strategy = {wanted!r}."
            )

"""LLaVA in the layout of 1.5: one image, one CLIP or SigLIP grid, a two-layer projector."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...prune.contract import Tower
from ...prune.errors import UnsupportedModelError
from ...prune.tiling import Tiling
from ..family import Family, Inputs, Modality, Model
from ..pictures.canvas import Fit

_TOWERS = ("clip_vision_model", "siglip_vision_model")


class Llava(Family):
    name = "llava"
    fit: ClassVar[Fit] = "crop"  # CLIP processors cut the centre out

    def vision_tower(self, model: Model) -> Any:
        return self.core(model).vision_tower

    def vision_attention(self, model: Model) -> Sequence[Any]:
        return [layer.self_attn for layer in self.vision_tower(model).encoder.layers]

    def tower(self, model: Model) -> Tower:
        tower = self.vision_tower(model)
        return Tower(
            num_layers=tower.config.num_hidden_layers,
            has_cls=hasattr(tower.embeddings, "class_embedding"),
            text_twin=tower.config.model_type == "clip_vision_model",
        )

    def tilings(
        self, model: Model, modality: Modality, features: Sequence[Tensor], inputs: Inputs
    ) -> Sequence[Tiling]:
        return [Tiling.single(*grid) for (grid,) in self.pictures(model, modality, inputs)]

    def pixels(self, model: Model, modality: Modality, inputs: Inputs) -> Sequence[Tensor]:
        return inputs["pixel_values"].split(1)

    def pictures(
        self, model: Model, modality: Modality, inputs: Inputs
    ) -> Sequence[Sequence[tuple[int, int]]]:
        patch = self.vision_tower(model).config.patch_size
        images, _, height, width = inputs["pixel_values"].shape
        return [[(height // patch, width // patch)]] * images

    def encoder_features(self, model: Model, output: Any, inputs: Inputs) -> Tensor:
        layers = self._feature_layers(model, inputs)
        return torch.cat([output.hidden_states[layer] for layer in layers], dim=-1)

    def unread_layers(self, model: Model, inputs: Inputs) -> Sequence[Any]:
        layers = self.vision_tower(model).encoder.layers
        states = range(len(layers) + 1)  # the embeddings, then the output of each layer
        try:
            deepest = max(states[layer] for layer in self._feature_layers(model, inputs))
        except IndexError:  # the model says what is wrong with it
            return ()
        return list(layers[deepest:])

    def _feature_layers(self, model: Model, inputs: Inputs) -> Sequence[int]:
        """The hidden states that the projector reads, as the call or the model says."""
        layers = inputs.get("vision_feature_layer")
        layers = model.config.vision_feature_layer if layers is None else layers
        return [layers] if isinstance(layers, int) else list(layers)

    def project(self, model: Model, rows: Tensor) -> Tensor:
        projected: Tensor = self.core(model).multi_modal_projector(rows[None])[0]
        return projected

    def per_image(
        self, model: Model, modality: Modality, values: Tensor, inputs: Inputs
    ) -> Sequence[Tensor]:
        return list(self.patches(model, values))

    def patches(self, model: Model, values: Tensor) -> Tensor:
        """Values without those of CLS: (B, P, ...)."""
        return values[:, 1:] if self.tower(model).has_cls else values

    def fixed_tokens(self, model: Model) -> int | None:
        return self.side(model) ** 2

    def side(self, model: Model) -> int:
        """Rows and columns of patches of one tile."""
        config = self.vision_tower(model).config
        return int(config.image_size // config.patch_size)

    def check(self, model: Model) -> None:
        kind = self.vision_tower(model).config.model_type
        if kind not in _TOWERS:
            raise UnsupportedModelError(
                f"{type(model).__name__} with a {kind!r} vision tower is not supported: use one of "
                f"{', '.join(_TOWERS)}."
            )
        strategy = model.config.vision_feature_select_strategy
        wanted = "default" if self.tower(model).has_cls else "full"
        if strategy != wanted:
            raise UnsupportedModelError(
                f"vision_feature_select_strategy={strategy!r} does not fit the {kind!r} tower, "
                f"whose patch grid is what is left by {wanted!r}: set "
                f"model.config.vision_feature_select_strategy = {wanted!r}."
            )

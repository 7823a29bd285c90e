"""Mistral 3 (Small 3.1 and later): Pixtral, pictures of any size, a break token behind each row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from ...prune.contract import Tower
from ...prune.tiling import Tiling
from ..family import Call
from ..merged import Merged


class Mistral3(Merged):
    """The patches of all pictures are one sequence, in which a mask keeps pictures apart; breaks
    between rows are text, and stay."""

    name = "mistral3"

    @property
    def vision_attention(self) -> Sequence[Any]:
        return [layer.attention for layer in self.vision_tower.transformer.layers]

    @property
    def tower(self) -> Tower:
        return replace(super().tower, rotary=True)

    @property
    def step(self) -> int:
        return int(self.model.config.spatial_merge_size)

    def tilings(self, call: Call, features: Sequence[Tensor]) -> Sequence[Tiling]:
        return [Tiling.single(*grid) for (grid,) in self.pictures(call)]

    def pixels(self, call: Call) -> Sequence[Tensor]:
        sizes = torch.as_tensor(call.inputs["image_sizes"]).tolist()
        pixels = call.inputs["pixel_values"].split(1)
        return [image[..., :h, :w] for image, (h, w) in zip(pixels, sizes, strict=True)]

    def only(self, call: Call, images: Sequence[int]) -> tuple[Sequence[int], Call]:
        """Padded to the largest of them."""
        sizes = torch.as_tensor(call.inputs["image_sizes"])[list(images)]
        height, width = sizes.amax(0).tolist()
        pixels = call.inputs["pixel_values"][list(images), :, :height, :width]
        some = {"pixel_values": pixels, "image_sizes": sizes}
        return images, replace(call, inputs={**call.inputs, **some})

    def pictures(self, call: Call) -> Sequence[Sequence[tuple[int, int]]]:
        return [[(h // self.step, w // self.step)] for h, w in self._patches(call)]

    def encoder_features(self, call: Call, output: Any) -> Tensor:
        layers = call.inputs.get("vision_feature_layer")
        layers = self.model.config.vision_feature_layer if layers is None else layers
        layers = [layers] if isinstance(layers, int) else layers
        return torch.cat([output.hidden_states[layer] for layer in layers], dim=-1)

    def project(self, rows: Tensor) -> Tensor:
        """As the projector does with a picture of one token, of each row."""
        patches = rearrange(rows, "k (u c) -> (k u) c", u=self.tower.merge_unit)
        pixels = self.step * self.vision_tower.config.patch_size
        sizes = torch.full((len(rows), 2), pixels, device=rows.device)
        projected: Tensor = self.core.multi_modal_projector(patches, sizes)
        return projected

    def _patches(self, call: Call) -> list[tuple[int, int]]:
        """Rows and columns of patches of each picture."""
        side = self.vision_tower.config.patch_size
        sizes = torch.as_tensor(call.inputs["image_sizes"]).tolist()
        return [(height // side, width // side) for height, width in sizes]

    def units(self, call: Call, values: Tensor) -> Sequence[Tensor]:
        sizes, step = self._patches(call), self.step
        return [
            rearrange(image, "(r i c j) ... -> (r c) (i j) ...", i=step, c=w // step, j=step)
            for image, (_, w) in zip(values[0].split([h * w for h, w in sizes]), sizes, strict=True)
        ]

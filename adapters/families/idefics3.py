"""Idefics 3: tiles between words, the whole picture last, 2 x 2 patches shuffled into a token."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...prune.errors import UnsupportedFeatureError
from ..family import Call, Modality
from ..tiled import Tiled

_MASK = "pixel_attention_mask"


class Idefics3(Tiled):
    """Pixels come prompt by prompt, (B, tiles, 3, H, W), filled up with tiles of zeros."""

    name = "idefics3"
    dropped = " (transformers takes tiles of zeros for padding, whoever made them)"

    @property
    def text_model(self) -> Any:
        return self.core.text_model

    @property
    def vision_tower(self) -> Any:
        return self.core.vision_model

    @property
    def projectors(self) -> Sequence[Any]:
        return [self.core.connector]

    @property
    def step(self) -> int:
        return int(self.model.config.scale_factor)

    def separates(self, gap: Sequence[int], behind: Sequence[int]) -> bool:
        """A mark opens every tile, and closes every image: two stand between images. It is the word
        behind the last tile; between rows of tiles and in their names are others."""
        if not behind:
            raise UnsupportedFeatureError(
                f"Nothing follows the last image, so that the mark which ends images of "
                f"{self.name} is not known: make the prompt with the model's own processor."
            )
        return gap.count(behind[0]) > 1

    def tiles(self, call: Call) -> Tensor:
        pixels: Tensor = call.inputs["pixel_values"]
        return pixels[self._real(call)]

    def num_tiles(self, call: Call) -> int:
        return int(self._real(call).sum())

    def _real(self, call: Call) -> Tensor:
        """Which tiles the model sees: (B, tiles) bool. Those of zeros fill prompts up."""
        pixels = call.inputs["pixel_values"]
        if pixels.is_meta:  # sizes alone are known
            return torch.ones(pixels.shape[:2], dtype=torch.bool)
        real: Tensor = (pixels != 0).flatten(2).any(2)
        return real

    def pooled(self, call: Call, images: Sequence[Tensor], kind: type) -> Any:
        if issubclass(kind, Tensor):  # of older releases; then prompt by prompt
            return super().pooled(call, images, kind)
        rows, columns = self.grid(call)
        tiles = self._real(call).sum(1) * rows * columns
        return list(torch.cat(list(images)).split(tiles.tolist()))

    def project(self, rows: Tensor) -> Tensor:
        projected: Tensor = self.core.connector.modality_projection(rows)
        return projected

    # --- images that are remembered ------------------------------------------------------------

    def per_image_arguments(self, modality: Modality) -> frozenset[str]:
        return super().per_image_arguments(modality) | {_MASK}

    def apart(self, call: Call) -> Sequence[str]:
        """Pixels that are padding."""
        mask = call.inputs.get(_MASK)
        if mask is None or bool(mask.all()):
            return [""] * len(self.counts(call))
        parts = mask[self._real(call).to(mask.device)].split(list(self.counts(call)))
        return [hashlib.sha256(part.bool().cpu().numpy().tobytes()).hexdigest() for part in parts]

    def only(self, call: Call, images: Sequence[int]) -> tuple[Sequence[int], Call]:
        """All in one prompt."""
        counts, real = list(self.counts(call)), self._real(call)
        some = dict(call.inputs)
        for name in ("pixel_values", _MASK):
            if some.get(name) is not None:
                tiles = some[name][real.to(some[name].device)].split(counts)
                some[name] = torch.cat([tiles[i] for i in images])[None]
        return images, replace(call, inputs=some, parts=tuple(counts[i] for i in images))

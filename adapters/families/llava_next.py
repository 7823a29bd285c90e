"""LLaVA-NeXT (1.6): a thumbnail and crops on a canvas without its padding, a newline a row."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers.models.llava_next.modeling_llava_next import (
    get_anyres_image_grid_shape,
    image_size_to_num_patches,
)

from ...prune.tiling import Block, Tiling
from ..family import VIDEO, Call
from .llava import Llava


class LlavaNext(Llava):
    name = "llava_next"
    fit = "stretch"  # the thumbnail is the whole picture, and so is the canvas without padding

    def tilings(self, call: Call, features: Sequence[Tensor]) -> Sequence[Tiling]:
        """Read off where the model's own packing puts the coordinates of each patch."""
        side, sizes = self.side, call.inputs["image_sizes"].tolist()
        counts = self.tile_counts(call)
        found = []
        for size, tiles in zip(sizes, counts, strict=True):
            coordinates = self._coordinates(size, tiles)
            mark = torch.full((2,), -1.0)
            (packed,) = self.pack([coordinates], torch.tensor([size]), mark)
            thumbnail = Block((side,), (side,))
            canvas = packed[side * side :]
            if tiles == 1:  # no crops: at most one newline at the end
                found.append(Tiling((Block((side,), (side,), "end" if len(canvas) else "none"),)))
                continue
            found.append(Tiling((thumbnail, self._canvas(canvas, side, self._grid(size)))))
        return found

    def pixels(self, call: Call) -> Sequence[Tensor]:
        if call.modality is VIDEO:
            return super().pixels(call)
        pixels, counts = call.inputs["pixel_values"], self.tile_counts(call)
        if pixels.dim() == 5:
            return [image[:count] for image, count in zip(pixels, counts, strict=True)]
        return list(pixels.split(counts))

    def pictures(self, call: Call) -> Sequence[Sequence[tuple[int, int]]]:
        if call.modality is VIDEO:
            return super().pictures(call)
        side, pinpoints = self.side, self.model.config.image_grid_pinpoints
        tile = self.vision_tower.config.image_size
        return [
            [(side, side)] * image_size_to_num_patches(size, pinpoints, tile)
            for size in call.inputs["image_sizes"].tolist()
        ]

    def tile_counts(self, call: Call) -> list[int]:
        """Tiles of each image."""
        return [len(tiles) for tiles in self.pictures(call)]

    def per_image(self, call: Call, values: Tensor) -> Sequence[Tensor]:
        patches = self.patches(values)
        counts = self.tile_counts(call)
        tiles = patches.reshape(*patches.shape[:2], -1).split(counts)
        packed = self.pack(tiles, call.inputs["image_sizes"], None)
        return [image.view(-1, *patches.shape[2:]) for image in packed]

    def pack(
        self, tiles: Sequence[Tensor], sizes: Tensor, newline: Tensor | None
    ) -> Sequence[Tensor]:
        """The model's own packing of (tiles, P, C) per image, with any newline: (N, C) each."""
        strategy = self.model.config.vision_feature_select_strategy
        packed: Sequence[Tensor]
        packed, _ = self.core.pack_image_features(
            tiles, sizes, vision_feature_select_strategy=strategy, image_newline=newline
        )
        return packed

    @property
    def fixed_tokens(self) -> int | None:
        return None

    def _canvas(self, packed: Tensor, side: int, grid: tuple[int, int]) -> Block:
        """What is left of a canvas of `grid` tiles, from the coordinates of its tokens (N, 2)."""
        rows = int((packed[:, 0] < 0).sum())
        if rows == len(packed):  # a picture so narrow that only newlines are left, or nothing
            return Block((side if rows else 0,) * grid[0], (0,) * grid[1], "rows")
        # Where the canvas was scaled down, so were the borders between its tiles.
        tile = (packed.view(rows, -1, 2)[:, :-1] + 0.5).floor().long() // side
        return Block(
            tuple(tile[:, 0, 0].bincount(minlength=grid[0]).tolist()),
            tuple(tile[0, :, 1].bincount(minlength=grid[1]).tolist()),
            "rows",
        )

    def _grid(self, size: list[int]) -> tuple[int, int]:
        """Rows and columns of crops."""
        rows, columns = get_anyres_image_grid_shape(
            size, self.model.config.image_grid_pinpoints, self.vision_tower.config.image_size
        )
        return rows, columns

    def _coordinates(self, size: list[int], tiles: int) -> Tensor:
        """Row and column of each patch, on its tile (thumbnail) or the canvas: (tiles, P, 2)."""
        side = self.side
        line = torch.arange(side, dtype=torch.float32)
        patch = torch.stack(torch.meshgrid(line, line, indexing="ij"), -1).view(1, -1, 2)
        rows, columns = self._grid(size) if tiles > 1 else (0, 0)
        crops = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)) * side
        return torch.cat([patch, patch + crops.view(-1, 1, 2)])

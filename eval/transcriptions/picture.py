"""What the released code bases hold of one image when they start to choose."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

SIDE = 24
"""Patches along the side of a tile."""


@dataclass(frozen=True, kw_only=True)
class Picture:
    """One image of `tiles` tiles, the first the thumbnail. P = 576 patches a tile, S = P + 1."""

    grid: tuple[int, int]
    """Rows and columns of crops; (0, 0) for a plain image."""
    queries: Mapping[int, Tensor]
    """By encoder layer: (tiles, H, S, D_head), CLS first."""
    keys: Mapping[int, Tensor]
    hidden: Tensor
    """(tiles, S, C): output of the last encoder layer but one, CLS first."""
    features: Tensor
    """(tiles, P, D): behind the projector."""
    packed: Tensor
    """(N, D): the same in the order of the LLM."""
    clip_image: Tensor
    """(tiles, P, D_clip)."""
    clip_text: Tensor
    """(segments, D_clip)."""
    text: Tensor
    """(T, D): embeddings of the question."""

    @property
    def tiles(self) -> int:
        return len(self.features)

    def attention(self, layer: int) -> Tensor:
        """The whole map of a layer as eager attention makes it: (tiles, H, S, S)."""
        return attention_map(self.queries[layer], self.keys[layer])


def attention_map(query: Tensor, key: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D_head)) in float32: (B, H, S, S)."""
    logits = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    return logits.softmax(-1, dtype=torch.float32)


def in_order(mask: Tensor, grid: tuple[int, int]) -> Tensor:
    """Numbers tile * P + patch of the marked patches (tiles, P) in the order of the LLM.

    The thumbnail row by row, then the crops joined to one canvas, row by row.
    """
    ids = torch.arange(mask.numel()).view(mask.shape)
    thumbnail = ids[0][mask[0]]
    if len(mask) == 1:
        return thumbnail
    return torch.cat([thumbnail, canvas(ids[1:], grid)[canvas(mask[1:], grid)]])


def canvas(crops: Tensor, grid: tuple[int, int]) -> Tensor:
    """Crops (rows * columns, P, ...) as one canvas (rows * SIDE, columns * SIDE, ...)."""
    rows, columns = grid
    rest = crops.shape[2:]
    joined = crops.reshape(rows, columns, SIDE, SIDE, *rest).transpose(1, 2)
    return joined.reshape(rows * SIDE, columns * SIDE, *rest)


def unpadded(height: int, width: int, image_height: int, image_width: int) -> tuple[slice, slice]:
    """Rows and columns of a canvas that show the image, the rest being its padding."""
    if image_width / image_height > width / height:
        padding = (height - int(image_height * width / image_width)) // 2
        return slice(padding, height - padding), slice(0, width)
    padding = (width - int(image_width * height / image_height)) // 2
    return slice(0, height), slice(padding, width - padding)

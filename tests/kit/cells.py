"""Values of patches as those of the tokens that they become: side by side, or their mean."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def averaged(values: Tensor, mean: bool) -> Tensor:
    """Values of squares of patches (tiles, P * 4, width) as those of 2 x 2: side by side, or their
    mean as pooling takes it, (tiles * P, width)."""
    if len(values) > 1:
        return torch.cat([averaged(square, mean) for square in values.split(1)])
    side = math.isqrt(values.shape[1])
    square = values[0].unflatten(0, (side, side)).permute(2, 0, 1)
    if mean:
        return torch.nn.functional.avg_pool2d(square, 2).flatten(1).T
    cells = square.unfold(1, 2, 2).unfold(2, 2, 2)  # (width, rows, columns, 2, 2)
    return cells.permute(1, 2, 3, 4, 0).flatten(2).flatten(0, 1)


def shuffled(tokens: Tensor, mean: bool) -> Tensor:
    """Values (P, 4 * width) that a model has shuffled itself, four behind each token: as they are,
    or their mean, (P, width)."""
    return tokens.unflatten(1, (4, -1)).mean(1) if mean else tokens

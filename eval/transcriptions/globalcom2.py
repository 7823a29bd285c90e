"""GlobalCom2: Python loops read single scores and move single rows of features."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import interpolate, normalize

from .picture import SIDE, Picture, canvas, unpadded

LEAST_TILES = 2
MOVES_ROWS = True


def read(picture: Picture) -> Tensor:
    """(tiles, P) logits of CLS: row of the head mean of the whole map before the softmax."""
    query, key = picture.queries[23], picture.keys[23]
    logits = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    return logits.mean(1)[:, 0, 1:]


def choose(picture: Picture, scores: Tensor, keep: int) -> Tensor:
    rows, columns = picture.grid
    size = (rows * 14 * SIDE, columns * 14 * SIDE)  # pixels: a canvas without padding
    newline = picture.features.new_zeros(picture.features.shape[-1])
    ratio = keep / scores.numel()
    return compressed(scores, picture.features, newline, ratio, picture.grid, size)


def compressed(
    logits: Tensor,
    features: Tensor,
    newline: Tensor,
    ratio: float,
    grid: tuple[int, int],
    image_size: tuple[int, int],
) -> Tensor:
    """Rows for the LLM: features (tiles, P, D) of the tokens that stay, a newline after every row.

    Args:
        logits: (tiles, P), the thumbnail first.
        grid: rows and columns of crops.
        image_size: height and width of the image.
    """
    patches = logits.shape[1]
    best = logits[0].argsort(descending=True)[: int(patches * ratio)]
    scales = crop_scales(logits[0], grid, ratio)
    crops = kept_of_crops(logits, scales, grid, image_size)
    return torch.cat([features[0][best], packed(crops, features[1:], newline, grid)])


def crop_scales(thumbnail: Tensor, grid: tuple[int, int], ratio: float) -> list[float]:
    """Share kept of every crop, from the sum of the logits (P,) in its part of the thumbnail."""
    rows, columns = grid
    sums = [0.0] * (rows * columns)
    for y in range(SIDE):
        for x in range(SIDE):
            row = min(y // (SIDE // rows), rows - 1)
            column = min(x // (SIDE // columns), columns - 1)
            sums[row * columns + column] += thumbnail[y * SIDE + x].item()
    powers = [math.exp((value - max(sums)) / 10) for value in sums]
    weights = [power / (sum(powers) + 1e-8) for power in powers]
    mean = sum(weights) / len(weights)
    return [min(1.0, ratio * (1 + weight - mean)) for weight in weights]


def kept_of_crops(
    logits: Tensor, scales: list[float], grid: tuple[int, int], image_size: tuple[int, int]
) -> list[tuple[Tensor, Tensor]]:
    """Per crop, the kept patches and their places among the patches that show the image."""
    rows, columns = grid
    height, width = rows * SIDE, columns * SIDE
    inside = torch.zeros(height, width, dtype=torch.bool)
    area = unpadded(height, width, *image_size)
    inside[area] = True
    of_crop = inside.view(rows, SIDE, columns, SIDE).transpose(1, 2).reshape(-1, SIDE * SIDE)
    valid = (area[0].stop - area[0].start, area[1].stop - area[1].start)
    image = interpolate(logits[0].view(1, 1, SIDE, SIDE), size=valid, mode="bilinear")[0, 0]
    chosen = []
    top = 0
    for row in range(rows):
        left = 0
        for column in range(columns):
            crop = row * columns + column
            patches = of_crop[crop].nonzero()[:, 0]
            shown = of_crop[crop].view(SIDE, SIDE)
            tall, wide = int(shown.any(1).sum()), int(shown.any(0).sum())
            globally = image[top : top + tall, left : left + wide].flatten()
            locally = logits[1 + crop][patches]
            score = normalize(locally, dim=0) + normalize(globally, dim=0)
            places = score.topk(int(len(patches) * scales[crop])).indices.sort().values
            chosen.append((patches[places], places))
            left += wide
        top += int(of_crop[row * columns].view(SIDE, SIDE).any(1).sum())
    return chosen


def packed(
    chosen: list[tuple[Tensor, Tensor]], crops: Tensor, newline: Tensor, grid: tuple[int, int]
) -> Tensor:
    """Rows in the order of the canvas. A token lands where its number *among the shown patches*
    says: the released code mixes the two numberings up, which matters with padding only."""
    buffer = torch.zeros(crops.shape, dtype=torch.float32)
    filled = torch.zeros(crops.shape[:2], dtype=torch.bool)
    for crop, (patches, places) in enumerate(chosen):
        for patch, place in zip(patches, places, strict=True):
            buffer[crop, place.item()] = crops[crop, patch.item()]
            filled[crop, place.item()] = True
    joined, marks = canvas(buffer, grid), canvas(filled, grid)
    height = len(joined)
    joined = torch.cat([joined, newline.expand(height, 1, -1)], dim=1)
    marks = torch.cat([marks, torch.ones(height, 1, dtype=torch.bool)], dim=1)
    return joined.flatten(0, 1)[marks.flatten()]

"""Tokens, towers and tilings for methods that weigh tiles and chunks."""

import math

import torch
from kit.tilings import DECODER, TOWERS
from torch import Tensor
from vlmprune.prune.contract import ClsLogits, Features, ModelShape, VisualTokens
from vlmprune.prune.tiling import Tiling


def span_of(original: tuple[int, int], canvas: tuple[int, int]) -> tuple[slice, slice]:
    """Rows and columns of a canvas (h, w) that an image (h, w) fills, scaled to fit in it."""
    height, width = canvas
    if original[1] * height > original[0] * width:
        pad = (height - int(original[0] * (width / original[1]))) // 2
        return slice(pad, height - pad), slice(0, width)
    pad = (width - int(original[1] * (height / original[0]))) // 2
    return slice(0, height), slice(pad, width - pad)


def merged(tiles: Tensor, grid: tuple[int, int]) -> Tensor:
    """Square tiles (n, P) on one canvas (height, width) of `grid` rows and columns of them."""
    side = math.isqrt(tiles.shape[1])
    canvas = tiles.view(*grid, side, side).transpose(1, 2)
    return canvas.reshape(grid[0] * side, grid[1] * side)


CPU = torch.device("cpu")


def shape_of(tower: str = "clip") -> ModelShape:
    return ModelShape(tower=TOWERS[tower], decoder=DECODER)


def make_tokens(method, tiling: Tiling, *, tower="clip", seed=0, constant=False) -> VisualTokens:
    shape, patches = shape_of(tower), tiling.num_patches
    generator = torch.Generator().manual_seed(seed)
    signals = {}
    for signal in method.needs(shape):
        size = (patches, 8) if isinstance(signal, Features) else (patches,)
        if constant:
            signals[signal] = torch.full(size, 0.25)
        elif isinstance(signal, Features | ClsLogits):
            signals[signal] = torch.randn(size, generator=generator) - 1
        else:
            signals[signal] = torch.rand(size, generator=generator) ** 4
    return VisualTokens(num_tokens=tiling.num_tokens, tiling=tiling, shape=shape, signals=signals)


def given_signals(method, tiling: Tiling, *values, tower="clip") -> VisualTokens:
    """Tokens with these signals, in the order of the method's needs."""
    shape = shape_of(tower)
    tensors = [torch.as_tensor(value, dtype=torch.float32) for value in values]
    signals = dict(zip(method.needs(shape), tensors, strict=True))
    return VisualTokens(num_tokens=tiling.num_tokens, tiling=tiling, shape=shape, signals=signals)


def least(method, tiling: Tiling) -> int:
    return tiling.num_newlines + 1 if method.newline_policy == "keep" else 1


def counts(method, tiling: Tiling) -> list[int]:
    """Every count of a small image; of others the smallest, the largest and some between."""
    low, high = least(method, tiling), tiling.num_tokens
    step = 1 if high < 30 else 11
    return sorted({*range(low, high, step), low + 1, high - 2, high - 1} & set(range(low, high)))

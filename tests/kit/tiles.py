"""Tokens, towers and tilings for methods that weigh tiles and chunks."""

import math

import torch
from torch import Tensor
from vlmprune.prune.contract import ClsLogits, Decoder, Features, ModelShape, Tower, VisualTokens
from vlmprune.prune.tiling import Block, Tiling


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
DECODER = Decoder(num_layers=32, hidden_size=64, intermediate_size=128)
TOWERS = {
    "clip": Tower(num_layers=24, has_cls=True),
    "siglip": Tower(num_layers=27, has_cls=False),
    "windowed": Tower(num_layers=32, has_cls=False, merge_unit=4, full_attention=(7, 15, 23, 31)),
    "merging": Tower(num_layers=32, has_cls=False, merge_unit=4),
    "one layer": Tower(num_layers=1, has_cls=True),
}
THUMBNAIL = Block((4,), (4,))
TILINGS = {
    "plain": Tiling.single(3, 5),
    "two": Tiling.single(1, 2),
    "line": Tiling.single(1, 7),
    "tall": Tiling.single(9, 1),
    "plain with newlines": Tiling((Block((4,), (3,), "rows"),)),
    "2 x 2": Tiling((THUMBNAIL, Block((4, 4), (4, 4)))),
    "2 x 2 with newlines": Tiling((THUMBNAIL, Block((4, 4), (4, 4), "rows"))),
    "without padding": Tiling((THUMBNAIL, Block((1, 4, 1), (4,), "rows"))),
    "with a lost tile": Tiling((THUMBNAIL, Block((3, 4), (4, 0, 2), "rows"))),
    "one crop": Tiling((THUMBNAIL, Block((2,), (3,), "rows"))),
    "video": Tiling((*[Block((2,), (3,))] * 3, Block((2,), (3,), "end"))),
}


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

"""Tokens, towers and tilings for methods that pick greedily."""

import math

import torch
from kit import tilings
from kit.golden import Golden
from kit.tilings import DECODER, TOWERS
from torch import Tensor
from vlmprune.prune.contract import (
    ClipImage,
    ClipText,
    EncoderFeatures,
    Features,
    LayerSignal,
    ModelShape,
    PixelSeed,
    TextEmbeddings,
    VisualTokens,
)
from vlmprune.prune.ops.parts import by_tile
from vlmprune.prune.tiling import Block, Tiling


def tiling_of(golden: Golden) -> Tiling:
    """The tiles of `features` (tiles, patches, width): the first alone, the others on a canvas."""
    tiles, patches = golden.arrays["features"].shape[:2]
    side = math.isqrt(patches)
    rows, columns = (side, side) if side * side == patches else (1, patches)
    alone = Block((rows,), (columns,))
    if not golden.params["grid_wh"]:
        return Tiling((alone,) * tiles)
    width, height = golden.params["grid_wh"]
    return Tiling((alone, Block((rows,) * height, (columns,) * width)))


def ids_of(tiling: Tiling) -> Tensor:
    """tile * patches + patch of every token, in the order of the LLM."""
    return by_tile(tiling, torch.device("cpu")).argsort()


TILINGS = {
    name: tiling for name, tiling in tilings.TILINGS.items() if name not in ("tall", "one crop")
}


def rand(seed: int, *size: int) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def shape_of(tower: str = "clip") -> ModelShape:
    return ModelShape(tower=TOWERS[tower], decoder=DECODER)


def read_before_the_llm(method, shape: ModelShape) -> list:
    """Its signals without those of a second stage in the decoder."""
    return [signal for signal in method.needs(shape) if not isinstance(signal, LayerSignal)]


def make_tokens(method, tiling: Tiling, *, tower="clip", seed=0, constant=False) -> VisualTokens:
    shape, patches, signals = shape_of(tower), tiling.num_patches, {}
    for number, signal in enumerate(read_before_the_llm(method, shape)):
        sizes = {ClipText: (2, 6), ClipImage: (patches, 6), TextEmbeddings: (3, 8)}
        sizes |= {Features: (patches, 8), EncoderFeatures: (patches, 8), PixelSeed: ()}
        size = sizes.get(type(signal), (patches,))
        signals[signal] = torch.ones(size) if constant else rand(seed * 10 + number, *size)
        if isinstance(signal, PixelSeed):
            signals[signal] = torch.tensor(seed + 12345)
    return VisualTokens(num_tokens=tiling.num_tokens, tiling=tiling, shape=shape, signals=signals)


def given_signals(method, tiling: Tiling, *values, tower="clip") -> VisualTokens:
    """Tokens with these signals, in the order of the method's needs."""
    shape = shape_of(tower)
    needs = read_before_the_llm(method, shape)
    signals = dict(zip(needs, map(torch.as_tensor, values), strict=True))
    return VisualTokens(num_tokens=tiling.num_tokens, tiling=tiling, shape=shape, signals=signals)


def unit_of(features: torch.Tensor) -> torch.Tensor:
    return features.double() / features.double().norm(dim=-1, keepdim=True)


def circle(*degrees: float) -> torch.Tensor:
    """Vectors of different lengths at these angles."""
    angles = torch.tensor(degrees).deg2rad()
    return torch.stack([angles.cos(), angles.sin()], 1) * torch.arange(1, len(degrees) + 1)[:, None]


def best_determinants(kernel: torch.Tensor, count: int) -> list[int]:
    """Greedy picks by the determinants themselves."""
    kernel, picks = kernel.double(), []
    for _ in range(count):
        gains = [
            -1.0 if i in picks else float(torch.det(kernel[[*picks, i]][:, [*picks, i]]))
            for i in range(len(kernel))
        ]
        picks.append(gains.index(max(gains)))
    return picks


def disperse(features, first, count, rule) -> list[int]:
    """Sums and maxima over all earlier picks, anew for every pick."""
    unit = unit_of(features)
    similar, picks = unit @ unit.T, [first]
    total = {"max_sum": sum, "k_center": max}[rule]
    while len(picks) < count:
        left = [i for i in range(len(unit)) if i not in picks]
        picks.append(min(left, key=lambda i: total(float(similar[i, p]) for p in picks)))
    return picks


def cover(features, text, keep, weight=0.7) -> list[int]:
    """The published sum, computed anew for every set of picks."""
    unit = unit_of(features)
    similar = (unit @ unit.T + 1) / 2
    aligned = torch.zeros(len(unit), dtype=torch.float64)
    if len(text):
        aligned = (unit @ unit_of(text.mean(0, keepdim=True))[0] + 1) / 2

    def value(picks: list[int]) -> float:
        return float(similar[:, picks].amax(1).sum() + weight * aligned[picks].sum())

    picks: list[int] = []
    for _ in range(keep):
        left = [i for i in range(len(unit)) if i not in picks]
        picks.append(max(left, key=lambda i: value([*picks, i])))
    return picks

"""CDPruner: keep tokens that are diverse given the question, as a determinant measures it.

Reference: Beyond Attention or Similarity: Maximizing Conditional Diversity for Token Pruning in
    MLLMs, NeurIPS 2025, arXiv 2506.10967.
Upstream: Theia-4869/CDPruner, llava/model/llava_arch.py (encode_images),
    commit 9541616c40fcd5625de1cdb8ea6c33c129eb7864.
Differs: once the picks span all tokens, the official code divides by zero and repeats tokens; here
    the rest of the count goes to the most relevant tokens.
    Where all tokens are equally relevant, diversity alone decides (official: infinities).
    Similarities are float32 throughout (official: of features normalised in fp16). A token of all
    zeros is picked last (official: NaN).
    Tiles get shares of the budget by their size (official: all tiles are equal, as padding stays).
    As published, relevance is the similarity of CLIP's patches to the text with its sign turned,
    scaled to 0..1 over all tiles of the image; newlines are dropped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ...batches import of_each_kind
from ...contract import (
    BeforeLLM,
    ClipImage,
    ClipText,
    Features,
    ModelShape,
    Scope,
    Selection,
    Signal,
    VisualTokens,
)
from ...ops.dpp import weighted_greedy_map
from ...ops.topk import ascending
from ...registry import register
from ...select import share


@register("cdpruner")
@dataclass(frozen=True, kw_only=True)
class CDPruner(BeforeLLM):
    """Greedy determinant maximisation in each tile, relevance weighed over the image.

    Recorded scores are the relevance: what each pick adds depends on the picks before it.
    """

    scopes: ClassVar[tuple[Scope, ...]] = ("image",)

    def needs(self, shape: ModelShape) -> tuple[Signal, ...]:
        return (Features(), ClipImage(), ClipText())

    def select(self, tokens: VisualTokens, keep: int) -> Selection:
        return self.select_batch([(tokens, keep)])[0]

    def select_batch(self, asked: Sequence[tuple[VisualTokens, int]]) -> list[Selection]:
        weights = [self._relevance(tokens) for tokens, _ in asked]
        tiles = [
            tile
            for (tokens, keep), own in zip(asked, weights, strict=True)
            for tile in _tiles(tokens, keep, own)
        ]
        kept: list[list[Tensor]] = [[] for _ in asked]
        picks = of_each_kind(tiles, lambda tile: len(tile.patches), _picked)
        owners = [i for i, (tokens, _) in enumerate(asked) for _ in tokens.tiling.tiles]
        for owner, tile, picked in zip(owners, tiles, picks, strict=True):
            kept[owner].append(tile.patches[picked[: tile.count]])
        return [
            Selection(kept=ascending(torch.cat(parts)), scores=own)
            for parts, own in zip(kept, weights, strict=True)
        ]

    def _relevance(self, tokens: VisualTokens) -> Tensor:
        """(N,)"""
        return relevance(tokens.signals[ClipImage()], tokens.signals[ClipText()])


@dataclass(frozen=True)
class _Tile:
    """What is chosen from at once."""

    patches: Tensor
    """(P,) their numbers in the image."""
    features: Tensor
    """(P, D)"""
    weights: Tensor
    """(P,)"""
    count: int


def _tiles(tokens: VisualTokens, keep: int, weights: Tensor) -> list[_Tile]:
    """The tiles of one image, all weights (N,) of which are on one scale."""
    features = tokens.signals[Features()]
    tiles = tokens.tiling.tile_patches(features.device)
    counts = share(keep, [len(tile) for tile in tiles])
    return [
        _Tile(tile, features[tile], weights[tile], count)
        for tile, count in zip(tiles, counts, strict=True)
    ]


def _picked(tiles: Sequence[_Tile]) -> Tensor:
    """Picks (B, K) in tiles of equal size, as many as any of them needs: fewer are the first."""
    weights = torch.stack([tile.weights for tile in tiles])
    most = max(tile.count for tile in tiles)
    return weighted_greedy_map([tile.features for tile in tiles], weights, most)


def relevance(image: Tensor, text: Tensor) -> Tensor:
    """How unlike the text (M, C) each patch (N, C) is in CLIP's space, scaled to 0..1: (N,)."""
    similar = normalize(image.float(), dim=-1) @ normalize(text.float(), dim=-1).T
    unlike = -similar.mean(1)
    low, high = unlike.aminmax()
    return torch.where(high > low, (unlike - low + 1e-6) / (high - low), 1)

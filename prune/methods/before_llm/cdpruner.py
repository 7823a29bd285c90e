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
from ...ops.dpp import greedy_map, weighted_cosines
from ...ops.topk import ascending
from ...registry import register
from ...select import share


@register("cdpruner")
@dataclass(frozen=True, kw_only=True)
class CDPruner(BeforeLLM):
    """Greedy determinant maximisation in each tile, relevance weighed over the image."""

    scopes: ClassVar[tuple[Scope, ...]] = ("image",)

    def needs(self, shape: ModelShape) -> tuple[Signal, ...]:
        return (Features(), ClipImage(), ClipText())

    def select(self, tokens: VisualTokens, keep: int) -> Selection:
        features, image, text = (tokens.signals[signal] for signal in self.needs(tokens.shape))
        weights = relevance(image, text)
        tiles = tokens.tiling.tile_patches(features.device)
        counts = share(keep, [len(tile) for tile in tiles])
        kept = []
        for numbers in _of_equal_size(tiles):
            most = max(counts[i] for i in numbers)
            kernels = [weighted_cosines(features[tiles[i]], weights[tiles[i]]) for i in numbers]
            fallback = torch.stack([weights[tiles[i]] for i in numbers])
            picks = greedy_map(torch.stack(kernels), most, fallback)
            kept += [tiles[i][pick[: counts[i]]] for i, pick in zip(numbers, picks, strict=True)]
        return Selection(kept=ascending(torch.cat(kept)))


def relevance(image: Tensor, text: Tensor) -> Tensor:
    """How unlike the text (M, C) each patch (N, C) is in CLIP's space, scaled to 0..1: (N,)."""
    similar = normalize(image.float(), dim=-1) @ normalize(text.float(), dim=-1).T
    unlike = -similar.mean(1)
    low, high = unlike.aminmax()
    return torch.where(high > low, (unlike - low + 1e-6) / (high - low), 1)


def _of_equal_size(tiles: Sequence[Tensor]) -> list[list[int]]:
    """Numbers of the tiles, those of one size together."""
    by_size: dict[int, list[int]] = {}
    for number, tile in enumerate(tiles):
        by_size.setdefault(len(tile), []).append(number)
    return list(by_size.values())

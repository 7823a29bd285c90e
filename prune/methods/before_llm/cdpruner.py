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
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ...batches import Greedy, stacked
from ...contract import (
    ClipImage,
    ClipText,
    Features,
    ModelShape,
    Selection,
    Signal,
    VisualTokens,
)
from ...ops.dpp import weighted_greedy_map
from ...registry import register
from ...tiles import InTiles, Part


@dataclass(frozen=True, slots=True)
class _Relevance(Signal):
    """How unlike the question each token is, on one scale for all of its image: (N,)."""


@register("cdpruner")
@dataclass(frozen=True, kw_only=True)
class CDPruner(InTiles, Greedy):
    """Greedy determinant maximisation in each tile, relevance weighed over the image.

    Recorded scores are the relevance: what each pick adds depends on the picks before it.
    """

    def needs(self, shape: ModelShape) -> tuple[Signal, ...]:
        return (Features(), ClipImage(), ClipText())

    def seen(self, tokens: VisualTokens) -> VisualTokens:
        features, *clip = (tokens.signals[signal] for signal in self.needs(tokens.shape))
        return replace(tokens, signals={Features(): features, _Relevance(): relevance(*clip)})

    def picks(self, images: Sequence[VisualTokens], count: int) -> Tensor:
        features = [tile.signals[Features()] for tile in images]
        return weighted_greedy_map(features, stacked(images, _Relevance()), count)

    def join(
        self, tokens: VisualTokens, parts: Sequence[Part], found: Sequence[Selection]
    ) -> Selection:
        return replace(super().join(tokens, parts, found), scores=tokens.signals[_Relevance()])


def relevance(image: Tensor, text: Tensor) -> Tensor:
    """How unlike the text (M, C) each patch (N, C) is in CLIP's space, scaled to 0..1: (N,)."""
    similar = normalize(image.float(), dim=-1) @ normalize(text.float(), dim=-1).T
    unlike = -similar.mean(1)
    low, high = unlike.aminmax()
    return torch.where(high > low, (unlike - low + 1e-6) / (high - low), 1)

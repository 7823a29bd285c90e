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
    `relevance="prompt"` needs no CLIP and follows openvinotoolkit/openvino.genai, src/cpp/src/
    visual_language/cdpruner/relevance_calculator.cpp, commit
    335d37ed543dbb422fcd29efa6e096cfb3fcd1a6: the mean cosine of a token with the embeddings of the
    text that belongs to the image, with its own sign (there: turned for LLaVA, if asked for).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, get_args

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
    TextEmbeddings,
    VisualTokens,
)
from ...fields import check_choice
from ...ops.dpp import weighted_greedy_map
from ...registry import register
from ...tiles import InTiles, Part

Relevance = Literal["clip", "prompt"]


@dataclass(frozen=True, slots=True)
class _Relevance(Signal):
    """How unlike the question each token is, on one scale for all of its image: (N,)."""


@register("cdpruner")
@dataclass(frozen=True, kw_only=True)
class CDPruner(InTiles, Greedy):
    """Greedy determinant maximisation in each tile, relevance weighed over the image.

    `relevance` says what tokens are compared with: the question in CLIP's space ("clip"), or the
    embeddings of the prompt's text, which every model has ("prompt").

    Recorded scores are the relevance: what each pick adds depends on the picks before it.
    """

    without_clip: ClassVar[Mapping[str, object]] = {"relevance": "prompt"}

    relevance: Relevance = "clip"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("relevance", self.relevance, get_args(Relevance))

    def needs(self, shape: ModelShape) -> tuple[Signal, ...]:
        if self.relevance == "prompt":
            return (Features(), TextEmbeddings())
        return (Features(), ClipImage(), ClipText())

    def seen(self, tokens: VisualTokens) -> VisualTokens:
        features, *clip = (tokens.signals[signal] for signal in self.needs(tokens.shape))
        found = relevance(*clip) if len(clip) == 2 else likeness(features, *clip)
        return replace(tokens, signals={Features(): features, _Relevance(): found})

    def picks(self, images: Sequence[VisualTokens], count: int) -> Tensor:
        features = [tile.signals[Features()] for tile in images]
        return weighted_greedy_map(features, stacked(images, _Relevance()), count)

    def join(
        self, tokens: VisualTokens, parts: Sequence[Part], found: Sequence[Selection]
    ) -> Selection:
        return replace(super().join(tokens, parts, found), scores=tokens.signals[_Relevance()])


def relevance(image: Tensor, text: Tensor) -> Tensor:
    """How unlike the text (M, C) each patch (N, C) is in CLIP's space, scaled to 0..1: (N,)."""
    unlike = -_similar(image, text).mean(1)
    low, high = unlike.aminmax()
    return torch.where(high > low, (unlike - low + 1e-6) / (high - low), 1)


def likeness(features: Tensor, text: Tensor) -> Tensor:
    """How like the text (T, D) each token (N, D) is, scaled to 0..1: (N,); 1 for all without
    text."""
    similar = _similar(features, text).mean(1)
    low, high = similar.aminmax()
    return torch.where(high > low, (similar - low) / (high - low + 1e-6), 1)


def _similar(tokens: Tensor, text: Tensor) -> Tensor:
    """Cosines (N, T)."""
    return normalize(tokens.float(), dim=-1) @ normalize(text.float(), dim=-1).T

"""HoloV: share the budget among crops of the image by attention and diversity, so all are heard.

Reference: Don't Just Chase "Highlighted Tokens" in MLLMs: Revisiting Visual Holistic Context
    Retention, NeurIPS 2025, arXiv 2510.02912.
Upstream: obananas/HoloV, llava/model/utils.py and qwen-model-HoloV/utils.py (HoloV),
    commit 1d2e65e961e698ff0e7d5bb4625489177dd9deba.
Differs: the crops are rectangles of the image, as the paper draws them (official: runs of the
    flattened sequence). A tiled image has crops on its thumbnail and on its canvas by their sizes.
    The diversity of a token, scaled to the attention over the whole image, moves budget between
    crops (official: scaled within each crop, where it cancels). It is the variance of its
    similarities to the others (official: and of one zero in place of that to itself).
    Crops share by the sum of their tokens' scores, as they may differ in size (official: mean).
    What a full crop cannot take goes to the others by their scores (official: vectors of zeros).
    The number of crops follows the Qwen file, which gives the 16 of the LLaVA file at 64 of 576.
    A crop kept whole is in the order of scores like any other (official: raster).
    `scores="received"`, for encoders without CLS, is what the Qwen file reads, there in the wrong
    order (windows) and off by one. Ties go to the lower index.
    As published, tokens of a crop are chosen by attention alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ...contract import BeforeLLM, Features, ModelShape, Scope, Selection, Signal, VisualTokens
from ...fields import check_int, check_layer, check_number
from ...layers import encoder_layer
from ...ops.parts import apportion, on_device, top_of_each
from ...ops.spread import even_shares, lattice_rows, share
from ...ops.topk import ascending
from ...registry import register
from ...salience import WITHOUT_CLS, Scores, check_scores, salience
from ...tiling import Tiling

_EPS = 1e-6
_BLOCK = 1024


@register("holov")
@dataclass(frozen=True, kw_only=True)
class HoloV(BeforeLLM):
    """`num_chunks` crops (None: by the budget, 16 at 64 of 576 tokens), diversity weighed `alpha`.

    `layer` is the ViT layer whose attention is read: None takes the last but one, or the last of
    an encoder that merges patches.
    """

    needs_grid: ClassVar[bool] = True
    scopes: ClassVar[tuple[Scope, ...]] = ("image", "tile")
    without_cls: ClassVar[Mapping[str, object]] = WITHOUT_CLS
    retired: ClassVar[Mapping[str, object]] = {"official": False}

    num_chunks: int | None = None
    alpha: float = 0.09
    layer: int | None = None
    scores: Scores = "cls"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_chunks is not None:
            hint = "give a number of crops, at least 1, or None"
            check_int("num_chunks", self.num_chunks, at_least=1, hint=hint)
        check_number("alpha", self.alpha)
        check_layer("layer", self.layer)
        check_scores(self.scores)

    def needs(self, shape: ModelShape) -> tuple[Signal, ...]:
        published = -1 if shape.tower.merge_unit > 1 else -2
        layer = encoder_layer(self.layer, published, shape.tower, field="layer")
        return Features(), salience(self.scores, layer)

    def select(self, tokens: VisualTokens, keep: int) -> Selection:
        features, attention = (tokens.signals[s].float() for s in self.needs(tokens.shape))
        number = self._number(tokens.num_tokens, keep)
        parts = on_device(_crops(tokens.tiling, number), attention.device)
        sizes = _crop_sizes(tokens.tiling, number)
        by_crop = parts.argsort(stable=True)
        diversity = torch.cat([_diversity(f) for f in features[by_crop].split(sizes)])
        diversity = diversity * (attention.mean() / (diversity.mean() + _EPS))
        scores = attention[by_crop] + self.alpha * diversity
        weights = torch.stack([crop.sum() for crop in scores.split(sizes)])
        counts = apportion(keep, weights, sizes, priority=weights)
        order = top_of_each(attention, parts, counts, keep)
        return Selection(kept=ascending(order), order=order, scores=attention)

    def _number(self, num_tokens: int, keep: int) -> int:
        """How many crops."""
        if self.num_chunks is None:
            return max(1, min(1024 * num_tokens // (576 * keep), num_tokens))
        return min(self.num_chunks, num_tokens)


def _diversity(features: Tensor) -> Tensor:
    """Variance of each token's cosine similarities to the others of its crop: (n, D) -> (n,)."""
    n = len(features)
    if n < 2:
        return features.new_zeros(n)
    unit, variances = normalize(features, dim=-1, eps=_EPS), []
    for start in range(0, n, _BLOCK):
        similar = unit[start : start + _BLOCK] @ unit.T
        similar.diagonal(start).zero_()
        away = (similar - similar.sum(1, keepdim=True) / (n - 1)).square_()
        away.diagonal(start).zero_()
        variances.append(away.sum(1) / (n - 1))
    return torch.cat(variances)


@lru_cache(maxsize=256)
def _crops(tiling: Tiling, number: int) -> Tensor:
    """The crop of each patch, crops in reading order: (P,) int64.

    Each block has its share of the crops, at least one, in rows that make them nearly square.
    """
    parts, start = [], 0
    blocks = [block for block in tiling.blocks if block.num_patches]
    shares = share(number, [block.num_patches for block in blocks])
    for block, count in zip(blocks, shares, strict=True):
        count = max(count, 1)
        bands = lattice_rows(count, block.rows, block.columns)
        heights = even_shares(block.rows, bands)
        for height, across in zip(heights, even_shares(count, bands), strict=True):
            widths = torch.tensor(even_shares(block.columns, across))
            row = torch.arange(start, start + across).repeat_interleave(widths)
            parts.append(row.repeat(height))
            start += across
    return torch.cat(parts)


@lru_cache(maxsize=256)
def _crop_sizes(tiling: Tiling, number: int) -> list[int]:
    return _crops(tiling, number).bincount().tolist()

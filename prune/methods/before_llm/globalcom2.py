"""GlobalCom2: the thumbnail tells how much of each crop to keep, and helps to choose it.

Reference: Global Compression Commander: Plug-and-Play Inference Acceleration for High-Resolution
    Large Vision-Language Models, AAAI 2026, arXiv 2501.05179.
Upstream: xuyang-liu16/GlobalCom2, llava/model/llava_arch.py (generate_scale_for_crop_features,
    compress_thumbnail, compress_crops), commit 96b2d00b86a22495285ab448cc89faedafddd78d.
Differs: tokens of a crop enter in raster order of the canvas. The official code numbers them among
    the crop's tokens without padding and takes these numbers for places on the whole crop, which
    mixes them up where there is padding.
    The count is exact: what rounding leaves goes to the largest remainders, what a full crop
    cannot take to the others. Official counts are rounded down from a ratio.
    The part of the thumbnail that shows a crop is that of the crop without its padding; its sum
    is scaled to that of equal parts. Official parts are equal, padding or not.
    Newlines are dropped or counted (official: kept on top of the budget, also of padded rows).
    An image without crops counts as a thumbnail and keeps its best, the best first; so does each
    frame of a video, and a thumbnail and the one crop beside it. The official code leaves plain
    images as they are.
    `scores="received"`, for encoders without CLS, reads the attention received in place of the
    logits of CLS: sums of it are positive and differ less or more, so `temperature` means
    something else there. Ties go to the lower index.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from einops import rearrange
from torch import Tensor
from torch.nn.functional import interpolate, normalize

from ...contract import (
    BeforeLLM,
    ClsLogits,
    ModelShape,
    Newlines,
    ReceivedAttention,
    Scope,
    Selection,
    Signal,
    VisualTokens,
)
from ...fields import check_layer, check_number
from ...layers import encoder_layer
from ...ops.parts import (
    apportion,
    by_tile,
    canvas_of,
    on_device,
    sums_of_crops,
    tile_numbers,
    top_of_each,
)
from ...ops.spread import share
from ...ops.topk import ascending, top_k
from ...registry import register
from ...salience import WITHOUT_CLS, Scores, check_scores
from ...tiling import Block, Tiling


@register("globalcom2")
@dataclass(frozen=True, kw_only=True)
class GlobalCom2(BeforeLLM):
    """Crops share by the softmax of their regions' scores, tempered by `temperature`.

    `layer` (None: the last) is the ViT layer whose CLS logits are read.
    """

    needs_grid: ClassVar[bool] = True
    newline_policies: ClassVar[tuple[Newlines, ...]] = ("keep", "drop")
    scopes: ClassVar[tuple[Scope, ...]] = ("image",)
    without_cls: ClassVar[Mapping[str, object]] = WITHOUT_CLS
    retired: ClassVar[Mapping[str, object]] = {"official": False, "retention_ratio": None}

    temperature: float = 10.0
    layer: int | None = None
    scores: Scores = "cls"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("temperature", self.temperature, positive=True)
        check_layer("layer", self.layer)
        check_scores(self.scores)

    def needs(self, shape: ModelShape) -> tuple[Signal, ...]:
        layer = encoder_layer(self.layer, -1, shape.tower, field="layer")
        return (ClsLogits(layer) if self.scores == "cls" else ReceivedAttention(layer),)

    def select(self, tokens: VisualTokens, keep: int) -> Selection:
        (signal,) = self.needs(tokens.shape)
        scores, canvas = tokens.signals[signal].float(), canvas_of(tokens.tiling)
        if canvas is None:
            return _best_first(scores, tokens, keep)
        thumbnail = tokens.tiling.tiles[0]
        first = thumbnail.num_patches
        base = rearrange(scores[:first], "(r c) -> r c", r=thumbnail.rows)
        own, counts, rest = self._counts(base, canvas, tokens, keep)

        combined = _with_global(scores[first:], base, canvas, tokens.tiling)
        parts = tile_numbers(tokens.tiling, scores.device)[first:] - 1
        crops = ascending(top_of_each(combined, parts, counts, rest))
        order = torch.cat([top_k(scores[:first], own), crops + first])
        ranks = torch.cat([scores[:first], combined])
        return Selection(kept=ascending(order), order=order, scores=ranks)

    def _counts(
        self, base: Tensor, canvas: Block, tokens: VisualTokens, keep: int
    ) -> tuple[int, Tensor, int]:
        """What the thumbnail keeps, what each crop does, and the sum over the crops."""
        sizes = [crop.num_patches for crop in tokens.tiling.tiles[1:]]
        ratio = keep / tokens.num_tokens
        own = round(base.numel() * ratio)
        scales = self._scales(base, canvas, ratio)
        counts = apportion(keep - own, scales * on_device(sizes, scales.device), sizes)
        return own, counts, keep - own

    def _scales(self, base: Tensor, canvas: Block, ratio: float) -> Tensor:
        """The published share that each crop keeps: (crops,) float64."""
        sizes = canvas.row_sizes, canvas.column_sizes
        area = sums_of_crops(torch.ones_like(base), *sizes)
        sums = sums_of_crops(base, *sizes) / area * (area.sum() / len(area))
        weights = ((sums - sums.max()) / self.temperature).exp()
        weights = weights / (weights.sum() + 1e-8)
        return (ratio * (1 + weights - weights.mean())).clamp_max(1)


def _best_first(scores: Tensor, tokens: VisualTokens, keep: int) -> Selection:
    """Of each tile its best, a share of the count by size, the best first."""
    counts = share(keep, [tile.num_patches for tile in tokens.tiling.tiles])
    parts = tile_numbers(tokens.tiling, scores.device)
    order = top_of_each(scores, parts, on_device(counts, scores.device), keep)
    return Selection(kept=ascending(order), order=order, scores=scores)


def _with_global(scores: Tensor, base: Tensor, canvas: Block, tiling: Tiling) -> Tensor:
    """Scores of the canvas (P,) plus the thumbnail's, each of unit length within a crop: (P,)."""
    size = (canvas.rows, canvas.columns)
    wide = interpolate(base[None, None], size, mode="bilinear", align_corners=False).flatten()
    order = by_tile(tiling, scores.device)[base.numel() :] - base.numel()
    sizes = [crop.num_patches for crop in tiling.tiles[1:]]
    crops = torch.stack([scores, wide], 1)[order].split(sizes)
    return torch.cat([normalize(crop, dim=0).sum(1) for crop in crops])[order.argsort()]

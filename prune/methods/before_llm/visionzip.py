"""VisionZip: keep the tokens that CLS attends to most, and merge the others into a few by keys.

Reference: VisionZip: Longer is Better but Not Necessary in Vision Language Models, CVPR 2025,
    arXiv 2412.04467.
Upstream: dvlab-research/VisionZip, visionzip/clip_encoder.py (CLIPVisionTower_VisionZip.forward)
    and visionzip/llava_arch.py (restore_image_features_sorted),
    commit 3151f6df4fca36a4cd1c985e5956e725b1f9ad02.
Differs: the budget is one number, CLS included; `contextual` is its share for merged tokens.
    Tiles get shares by their size (official: all tiles are equal), and a share of one row is the
    most salient patch rather than CLS. A tile whose share is its size stays as it is.
    `scores="received"` ranks by received attention and adds no CLS row: every row is a patch. So is
    it where the projector merges patches, and has no place for a CLS row.
    Blocks of several tiles end in their CLS rows and merged rows as published; a block of one tile
    (thumbnail, plain image, frame of a video) starts with its CLS row.
    As published, a merged row is its target plus the mean of the tokens assigned to it.
    Keys of zeros are similar to nothing (official: NaN). The layer follows the encoder's depth;
    keys are those that its attention uses, rotated where it rotates them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from ...batches import InOnePass, stacked
from ...contract import (
    ClsFeatures,
    EncoderFeatures,
    Keys,
    ModelShape,
    Selection,
    Signal,
    VisualTokens,
)
from ...fields import check_fraction, check_layer
from ...joining import rearranged
from ...layers import encoder_layer
from ...ops.merge import complement, merged_evenly
from ...ops.parts import on_device
from ...ops.topk import ascending, top_k
from ...registry import register
from ...salience import WITHOUT_CLS, Scores, check_scores, salience
from ...tiles import InTiles, Part
from ...tiling import Tiling


@register("visionzip")
@dataclass(frozen=True, kw_only=True)
class VisionZip(InTiles, InOnePass):
    """Dominant tokens, CLS among them, and merged ones (share `contextual` of the budget).

    `layer` is the ViT layer whose attention and keys are read; None takes the penultimate one.
    """

    without_cls: ClassVar[Mapping[str, object]] = WITHOUT_CLS

    contextual: float = 10 / 64
    layer: int | None = None
    scores: Scores = "cls"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fraction("contextual", self.contextual)
        check_layer("layer", self.layer)
        check_scores(self.scores)

    def needs(self, shape: ModelShape) -> tuple[Signal, ...]:
        layer = encoder_layer(self.layer, -2, shape.tower, field="layer")
        cls = (ClsFeatures(),) if self.scores == "cls" and shape.tower.merge_unit == 1 else ()
        return (salience(self.scores, layer), Keys(layer), EncoderFeatures(), *cls)

    def select_equal(self, images: Sequence[VisualTokens], keep: int) -> list[Selection]:
        """Of each tile its CLS row, the dominant tokens in raster order, the merged rows."""
        attention, keys, features, *cls = self.needs(images[0].shape)
        scores = stacked(images, attention)
        own, dominant, merged = self._rows(images[0].shape, scores.shape[1], keep)
        best = top_k(scores, dominant)
        rest = complement(best, scores.shape[1])
        metric = torch.stack([tile.signals[keys].float().mean(1) for tile in images])
        targets, means, owners, members = merged_evenly(
            stacked(images, features), metric, rest, merged
        )
        order = torch.cat([best.new_full((len(best), own), -1), ascending(best), targets], 1)
        entering = torch.cat([*(stacked(images, signal) for signal in cls[:own]), means], 1)
        place = torch.arange(keep, device=best.device)
        rows = torch.cat([place[:own], place[own + dominant :]])
        groups = torch.stack([owners + own + dominant, members], 1)
        return [
            Selection(
                kept=kept,
                order=of_tile,
                features=instead if own + merged else None,
                rows=rows if own + merged else None,
                groups=pairs if merged else None,
                scores=ranks,
            )
            for kept, of_tile, instead, pairs, ranks in zip(
                ascending(order[:, own:]), order, entering, groups, scores, strict=True
            )
        ]

    def join(
        self, tokens: VisualTokens, parts: Sequence[Part], found: Sequence[Selection]
    ) -> Selection:
        chosen = super().join(tokens, parts, found)
        if len(tokens.tiling.tiles) > 1:
            chosen = rearranged(chosen, self._arrangement(tokens.tiling, parts, chosen.arranged))
        return replace(chosen, scores=tokens.signals[self.needs(tokens.shape)[0]])

    def _rows(self, shape: ModelShape, patches: int, keep: int) -> tuple[int, int, int]:
        """How many rows of a tile are CLS, dominant and merged."""
        if keep == patches:
            return 0, keep, 0
        merged = min(round(keep * self.contextual), keep - 1)
        own = int(ClsFeatures() in self.needs(shape) and keep > 1)
        return own, keep - own - merged, merged

    def _arrangement(self, tiling: Tiling, parts: Sequence[Part], order: Tensor) -> Tensor:
        """The rows (K,) of an image whose tiles follow one another: block by block, and in a block
        of several tiles all dominant ones in raster order, all CLS, all merged."""
        tiles = Counter(tile.block for tile in tiling.tiles)
        kinds: list[int] = []
        for part in parts:
            block = tiling.tiles[part.tokens.tile].block
            own, dominant, merged = self._rows(
                part.tokens.shape, part.tokens.num_tokens, part.keep or 0
            )
            kinds += [3 * block + (tiles[block] > 1)] * own
            kinds += [3 * block] * dominant + [3 * block + 2] * merged
        kind = on_device(kinds, order.device)
        place = torch.arange(len(order), device=order.device)
        # CLS has no number, and lies before the dominant rows of its kind.
        within = torch.where(kind % 3 == 0, order, place)
        return (kind * 2 * tiling.num_patches + within).argsort()

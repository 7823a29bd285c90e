"""VisionZip: keep the tokens that CLS attends to most, and merge the others into a few by keys.

Reference: VisionZip: Longer is Better but Not Necessary in Vision Language Models, CVPR 2025,
    arXiv 2412.04467.
Upstream: dvlab-research/VisionZip, visionzip/clip_encoder.py (CLIPVisionTower_VisionZip.forward)
    and visionzip/llava_arch.py (restore_image_features_sorted),
    commit 3151f6df4fca36a4cd1c985e5956e725b1f9ad02.
Differs: the budget is one number, CLS included; `contextual` is its share for merged tokens.
    Tiles get shares by their size (official: all tiles are equal), and a share of one row is the
    most salient patch rather than CLS. A tile whose share is its size stays as it is.
    `scores="received"` ranks by received attention and adds no CLS row: every row is a patch.
    Blocks of several tiles end in their CLS rows and merged rows as published; a block of one tile
    (thumbnail, plain image, frame of a video) starts with its CLS row.
    As published, a merged row is its target plus the mean of the tokens assigned to it.
    Keys of zeros are similar to nothing (official: NaN). The layer follows the encoder's depth;
    keys are those that its attention uses, rotated where it rotates them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ...contract import (
    BeforeLLM,
    ClsFeatures,
    EncoderFeatures,
    Keys,
    ModelShape,
    Scope,
    Selection,
    Signal,
    VisualTokens,
)
from ...layers import encoder_layer
from ...ops.checks import check_fraction, check_layer
from ...ops.merge import bags, complement
from ...ops.salience import Scores, check_scores, salience
from ...ops.topk import ascending, top_k
from ...registry import register
from ...select import share


@register("visionzip")
@dataclass(frozen=True, kw_only=True)
class VisionZip(BeforeLLM):
    """Dominant tokens, CLS among them, and merged ones (share `contextual` of the budget).

    `layer` is the ViT layer whose attention and keys are read; None takes the penultimate one.
    """

    scopes: ClassVar[tuple[Scope, ...]] = ("image",)

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
        cls = (ClsFeatures(),) if self.scores == "cls" else ()
        return (salience(self.scores, layer), Keys(layer), EncoderFeatures(), *cls)

    def select(self, tokens: VisualTokens, keep: int) -> Selection:
        tiling = tokens.tiling
        counts = share(keep, [tile.num_patches for tile in tiling.tiles])
        rows: list[_Rows] = []
        for _, numbers in groupby(range(len(counts)), lambda i: tiling.tiles[i].block):
            block = [self._of_tile(tokens, number, counts[number]) for number in numbers]
            rows += _in_block(block)
        return _joined(rows)

    def _of_tile(self, tokens: VisualTokens, number: int, count: int) -> _Parts:
        """The `count` rows of one tile."""
        patches = tokens.tiling.tile_patches(tokens.device)[number]
        if count in (0, len(patches)):
            return _Parts(None, patches[:count], None)
        scores, keys, features, *cls = (tokens.signals[s] for s in self.needs(tokens.shape))
        merged = min(round(count * self.contextual), count - 1)
        cls_row = None
        if cls and count > 1:
            cls_row = _Rows(patches.new_full((1,), -1), cls[0][number : number + 1])
        dominant = top_k(scores[patches], count - merged - (cls_row is not None))
        rest = patches[complement(dominant, len(patches))]
        contextual = _contextual(features, keys, rest, merged) if merged else None
        return _Parts(cls_row, patches[dominant], contextual)


class _Rows(NamedTuple):
    """Consecutive rows: their tokens (-1 for CLS), and what enters instead of these."""

    order: Tensor
    features: Tensor | None = None
    groups: Tensor | None = None

    @property
    def is_cls(self) -> bool:
        return self.features is not None and self.groups is None


class _Parts(NamedTuple):
    """The rows of one tile."""

    cls: _Rows | None
    dominant: Tensor  # in any order
    contextual: _Rows | None


def _contextual(features: Tensor, keys: Tensor, rest: Tensor, count: int) -> _Rows:
    """`count` evenly spaced tokens of `rest` (M,), each joined by those most like it by keys."""
    places = torch.arange(count, device=rest.device)
    spaced = places * (len(rest) // count)
    targets = rest[spaced]
    metric = normalize(keys[rest].float().mean(1), dim=-1)  # over heads
    owner = (metric @ metric[spaced].T).argmax(1).index_copy(0, spaced, places)
    owner, by_owner = owner.sort(stable=True)
    members, starts = rest[by_owner], torch.searchsorted(owner, places)
    assigned = torch.searchsorted(owner, places, right=True) - starts - 1
    weights = torch.where(members == targets[owner], 1, 1 / assigned.clamp_min(1)[owner])
    merged = bags(features, members, starts, weights)
    return _Rows(targets, merged, torch.stack([owner, members]))


def _in_block(tiles: Sequence[_Parts]) -> list[_Rows]:
    """The rows of a block's tiles: all dominant ones in raster order, all CLS, all merged."""
    dominant = [_Rows(ascending(torch.cat([tile.dominant for tile in tiles])))]
    cls = [tile.cls for tile in tiles if tile.cls]
    merged = [tile.contextual for tile in tiles if tile.contextual]
    if len(tiles) == 1:
        return [*cls, *dominant, *merged]
    return [*dominant, *cls, *merged]


def _joined(parts: Sequence[_Rows]) -> Selection:
    """The rows one after the other."""
    order = torch.cat([part.order for part in parts])
    places = torch.arange(len(order), device=order.device).split([len(p.order) for p in parts])
    placed = list(zip(parts, places, strict=True))
    entering = [(part.features, at) for part, at in placed if part.features is not None]
    groups = [
        torch.stack([at[part.groups[0]], part.groups[1]])
        for part, at in placed
        if part.groups is not None
    ]
    return Selection(
        kept=ascending(torch.cat([part.order for part in parts if not part.is_cls])),
        order=order,
        features=torch.cat([features for features, _ in entering]) if entering else None,
        rows=torch.cat([at for _, at in entering]) if entering else None,
        groups=torch.cat(groups, 1) if groups else None,
    )

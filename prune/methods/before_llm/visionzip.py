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

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ...batches import of_each_kind
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
from ...fields import check_fraction, check_layer
from ...layers import encoder_layer
from ...ops.merge import bags, complement
from ...ops.topk import ascending, top_k
from ...registry import register
from ...salience import WITHOUT_CLS, Scores, check_scores, salience
from ...select import share
from ...tiling import Tiling


@register("visionzip")
@dataclass(frozen=True, kw_only=True)
class VisionZip(BeforeLLM):
    """Dominant tokens, CLS among them, and merged ones (share `contextual` of the budget).

    `layer` is the ViT layer whose attention and keys are read; None takes the penultimate one.
    """

    scopes: ClassVar[tuple[Scope, ...]] = ("image",)
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
        cls = (ClsFeatures(),) if self.scores == "cls" else ()
        return (salience(self.scores, layer), Keys(layer), EncoderFeatures(), *cls)

    def select(self, tokens: VisualTokens, keep: int) -> Selection:
        return self.select_batch([(tokens, keep)])[0]

    def select_batch(self, asked: Sequence[tuple[VisualTokens, int]]) -> list[Selection]:
        """Tiles of equal size and count, of whichever image, are one pass."""
        tiles: list[_Tile] = []
        for tokens, keep in asked:
            patches = tokens.tiling.tile_patches(tokens.device)
            counts = share(keep, [len(of_tile) for of_tile in patches])
            of_image = enumerate(zip(patches, counts, strict=True))
            tiles += [_Tile(tokens, number, *tile) for number, tile in of_image]
        parts = of_each_kind(tiles, lambda tile: (len(tile.patches), tile.keep), self._of_equal)
        in_order = iter(parts)
        found = []
        for tokens, _ in asked:
            own = list(islice(in_order, len(tokens.tiling.tiles)))
            scores = tokens.signals[self.needs(tokens.shape)[0]]
            found.append(_joined(_arranged(tokens.tiling, own), scores))
        return found

    def _of_equal(self, tiles: Sequence[_Tile]) -> list[_Parts]:
        """The rows of tiles that have equally many patches and keep equally many."""
        keep, patches = tiles[0].keep, torch.stack([tile.patches for tile in tiles])
        if keep in (0, patches.shape[1]):
            return [_Parts(None, whole[:keep], None) for whole in patches]
        scores, keys, features, *cls = self.needs(tiles[0].tokens.shape)
        merged = min(round(keep * self.contextual), keep - 1)
        cls_rows: list[_Rows | None] = [None] * len(tiles)
        if cls and keep > 1:
            mark = patches.new_full((1,), -1)
            cls_rows = [_Rows(mark, t.tokens.signals[cls[0]][t.number, None]) for t in tiles]
        best = top_k(_of(tiles, scores), keep - merged - (cls_rows[0] is not None))
        dominant = patches.gather(1, best)
        contextual: Sequence[_Rows | None] = [None] * len(tiles)
        if merged:
            rest = complement(best, patches.shape[1])
            metric = torch.stack([t.tokens.signals[keys][t.patches].float().mean(1) for t in tiles])
            contextual = _contextual(_of(tiles, features), metric, patches, rest, merged)
        return list(map(_Parts, cls_rows, dominant, contextual))


class _Tile(NamedTuple):
    """One of an image's tiles, and how many rows it has to keep."""

    tokens: VisualTokens
    number: int
    patches: Tensor
    keep: int


def _of(tiles: Sequence[_Tile], signal: Signal) -> Tensor:
    """A signal per token of tiles of equal size: (tiles, patches, ...)."""
    return torch.stack([tile.tokens.signals[signal][tile.patches] for tile in tiles])


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


def _contextual(
    features: Tensor, metric: Tensor, patches: Tensor, rest: Tensor, count: int
) -> list[_Rows]:
    """Of each tile `count` evenly spaced tokens of `rest` (B, M), each joined by those of `rest`
    that are most like it by `metric`, keys averaged over heads (B, N, D_head)."""
    (tiles, others), num_patches = rest.shape, patches.shape[1]
    tile = torch.arange(tiles, device=rest.device)[:, None]
    places = torch.arange(count, device=rest.device).repeat(tiles, 1)
    spaced = places * (others // count)
    unit = normalize(metric[tile, rest], dim=-1)
    owner = (unit @ unit[tile, spaced].mT).argmax(2).scatter(1, spaced, places)
    owner, by_owner = owner.sort(stable=True)
    members, targets = rest.gather(1, by_owner), rest.gather(1, spaced)
    starts = torch.searchsorted(owner, places)
    assigned = torch.searchsorted(owner, places, right=True) - starts - 1
    is_target = members == targets.gather(1, owner)
    weights = torch.where(is_target, 1, (1 / assigned.clamp_min(1)).gather(1, owner))
    merged = bags(
        features.flatten(0, 1),
        (members + tile * num_patches).flatten(),
        (starts + tile * others).flatten(),
        weights.flatten(),
    )
    groups = torch.stack([owner, patches.gather(1, members)], 1)
    rows = merged.unflatten(0, (tiles, count))
    return list(map(_Rows, patches.gather(1, targets), rows, groups))


def _arranged(tiling: Tiling, tiles: Sequence[_Parts]) -> list[_Rows]:
    """The rows of an image, block by block."""
    by_block = groupby(zip(tiling.tiles, tiles, strict=True), lambda pair: pair[0].block)
    return [row for _, block in by_block for row in _in_block([parts for _, parts in block])]


def _in_block(tiles: Sequence[_Parts]) -> list[_Rows]:
    """The rows of a block's tiles: all dominant ones in raster order, all CLS, all merged."""
    dominant = [_Rows(ascending(torch.cat([tile.dominant for tile in tiles])))]
    cls = [tile.cls for tile in tiles if tile.cls]
    merged = [tile.contextual for tile in tiles if tile.contextual]
    if len(tiles) == 1:
        return [*cls, *dominant, *merged]
    return [*dominant, *cls, *merged]


def _joined(parts: Sequence[_Rows], scores: Tensor) -> Selection:
    """The rows one after the other; `scores` (N,) ranked the dominant ones."""
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
        scores=scores,
    )

"""HiRED: share the budget among thumbnail and crops by what an early ViT layer sees in each.

Reference: HiRED: Attention-Guided Token Dropping for Efficient Inference of High-Resolution
    Vision-Language Models, AAAI 2025, arXiv 2408.10945.
Upstream: hasanar1f/HiRED, transformers/src/transformers/models/llava_next/modeling_llava_next.py
    and transformers/src/transformers/models/llava/modeling_llava.py (HiRED_token_selection),
    commit 502d6dd79a03e87cc808cedba8b8a951d93cb62b.
Differs: the share of a crop follows the part of the thumbnail that shows it. The official code
    counts in horizontal strips of the thumbnail, one a crop.
    The count is exact: what rounding leaves goes to the largest remainders, what a full tile
    cannot take to the others. Official shares are rounded down.
    A thumbnail token on the border of two crops counts for both, by area.
    Padding is no candidate, so that no kept token is lost with it. The official packing also
    swaps height and width of the grid.
    Layers: the first, and the last but one, on every depth. Ties go to the lower index.
    A thumbnail beside one crop only, and frames of a video, share the budget by their size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from einops import rearrange
from torch import Tensor

from ...contract import BeforeLLM, ModelShape, Scope, Selection, Signal, VisualTokens
from ...fields import check_fraction, check_layer
from ...layers import encoder_layer
from ...ops.parts import apportion, canvas_of, on_device, sums_of_crops, tile_numbers, top_of_each
from ...ops.spread import share
from ...ops.topk import ascending, top_k
from ...registry import register
from ...salience import WITHOUT_CLS, Scores, check_scores, salience
from ...tiling import Block


@register("hired")
@dataclass(frozen=True, kw_only=True)
class HiRED(BeforeLLM):
    """The thumbnail gets the share `alpha`; each crop by its share of the thumbnail's best tokens.

    `budget_layer` (None: the first) says which tokens of the thumbnail are the best, and `layer`
    (None: the last but one) which tokens of each tile are kept.
    """

    needs_grid: ClassVar[bool] = True
    scopes: ClassVar[tuple[Scope, ...]] = ("image",)
    without_cls: ClassVar[Mapping[str, object]] = WITHOUT_CLS
    retired: ClassVar[Mapping[str, object]] = {"official": False}

    alpha: float = 0.5
    budget_layer: int | None = None
    layer: int | None = None
    scores: Scores = "cls"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fraction("alpha", self.alpha)
        check_layer("budget_layer", self.budget_layer)
        check_layer("layer", self.layer)
        check_scores(self.scores)

    def needs(self, shape: ModelShape) -> tuple[Signal, ...]:
        return tuple(dict.fromkeys(self._signals(shape)))

    def select(self, tokens: VisualTokens, keep: int) -> Selection:
        early, late = (tokens.signals[signal] for signal in self._signals(tokens.shape))
        sizes = [tile.num_patches for tile in tokens.tiling.tiles]
        canvas = canvas_of(tokens.tiling)
        if canvas is None:
            counts = on_device(share(keep, sizes), late.device)
        else:
            first = tokens.tiling.tiles[0]
            thumbnail = rearrange(early[: sizes[0]], "(r c) -> r c", r=first.rows)
            counts = self._counts(thumbnail, canvas, sizes, keep)
        parts = tile_numbers(tokens.tiling, late.device)
        return Selection(kept=ascending(top_of_each(late, parts, counts, keep)), scores=late)

    def _counts(self, thumbnail: Tensor, canvas: Block, sizes: list[int], keep: int) -> Tensor:
        """(tiles,) of the thumbnail, with early scores (rows, columns), and of each crop."""
        first, *crops = sizes
        own = max(min(round(keep * self.alpha), first), keep - sum(crops))
        best = _best(thumbnail.flatten(), round(first * (1 - self.alpha))).view_as(thumbnail)
        shown = sums_of_crops(best, canvas.row_sizes, canvas.column_sizes)
        return _joined(own, apportion(keep - own, shown, crops))

    def _signals(self, shape: ModelShape) -> tuple[Signal, Signal]:
        tower = shape.tower
        early = encoder_layer(
            self.budget_layer, 0, tower, depth_published=tower.num_layers, field="budget_layer"
        )
        late = encoder_layer(self.layer, -2, tower, field="layer")
        return salience(self.scores, early), salience(self.scores, late)


def _best(scores: Tensor, count: int) -> Tensor:
    """1 at the `count` best of (N,), else 0."""
    return torch.zeros_like(scores, dtype=torch.float32).index_fill(0, top_k(scores, count), 1)


def _joined(own: int, crops: Tensor) -> Tensor:
    return torch.cat([crops.new_full((1,), own), crops])

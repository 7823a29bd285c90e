"""FoPru: keep the visual tokens, or the rows of them, that the encoder attends to most.

Reference: FoPru: Focal Pruning for Efficient Large Vision-Language Models, arXiv 2411.14164.
Upstream: none, no code was published.
Differs: CLS is dropped from both axes of the attention map, which the paper leaves open: with it
    every row sums to one, and the attention given would be the same for all tokens.
    The default takes the attention received; the paper's rule, the axis of larger variance, is
    `axis="auto"`. Encoders without CLS have no choice.
    Row strategy: whole rows as long as they fit; the rest of the count are the best tokens of the
    next row (paper: unsaid). On tiles of one image, the rows are those of the tiles.
    Ties go to the lower index.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from einops import reduce
from torch import Tensor

from ...batches import InOnePass, ranked
from ...contract import (
    AttentionToCls,
    ClsAttention,
    ModelShape,
    ReceivedAttention,
    Scope,
    Selection,
    Signal,
    Tower,
    VisualTokens,
)
from ...fields import check_choice, check_layer
from ...layers import encoder_layer
from ...ops.parts import by_tile
from ...ops.topk import ascending, top_k
from ...registry import register

Strategy = Literal["rank", "row"]
Axis = Literal["received", "given", "auto"]


@register("fopru")
@dataclass(frozen=True, kw_only=True)
class FoPru(InOnePass):
    """Mean attention in one ViT layer, `layer` (None: the last but one).

    `strategy` says what is ranked by it: tokens ("rank") or whole rows of them ("row").
    `axis` says which mean: of the attention that a token receives, of that which it gives, or the
    one with the larger variance.
    """

    needs_grid: ClassVar[bool] = True
    scopes: ClassVar[tuple[Scope, ...]] = ("tile", "image")

    strategy: Strategy = "rank"
    axis: Axis = "received"
    layer: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("strategy", self.strategy, get_args(Strategy))
        check_choice("axis", self.axis, get_args(Axis))
        check_layer("layer", self.layer)

    def needs(self, shape: ModelShape) -> tuple[Signal, ...]:
        layer, has_cls = self._layer(shape.tower), shape.tower.has_cls
        wanted: list[Signal] = []
        if self.axis != "given":
            wanted.append(ReceivedAttention(layer))
            wanted += [ClsAttention(layer)] * has_cls
        if self.axis == "given" or (self.axis == "auto" and has_cls):
            wanted.append(AttentionToCls(layer))
        return tuple(wanted)

    def select_equal(self, images: Sequence[VisualTokens], keep: int) -> list[Selection]:
        scores = torch.stack([self._scores(tokens) for tokens in images])
        best = top_k(scores, scores.shape[1])
        if self.strategy == "row":
            ranks = torch.stack(list(map(_row_ranks, scores, images)))
            best = best.gather(1, ranks.gather(1, best).argsort(stable=True))
        return list(map(ranked, ascending(best[:, :keep]), scores))

    def _scores(self, tokens: VisualTokens) -> Tensor:
        """The chosen mean (N,), times the number of patches and up to a constant."""
        layer, tower = self._layer(tokens.shape.tower), tokens.shape.tower
        seen = {signal: tensor.float() for signal, tensor in tokens.signals.items()}
        if self.axis == "given":  # of 1 in all: what CLS does not get
            return -seen[AttentionToCls(layer)]
        received = seen[ReceivedAttention(layer)]
        if tower.has_cls:
            received = received - seen[ClsAttention(layer)]
        if self.axis == "received" or not tower.has_cls:
            return received
        given = -seen[AttentionToCls(layer)]
        return torch.where(given.var(correction=0) > received.var(correction=0), given, received)

    def _layer(self, tower: Tower) -> int:
        return encoder_layer(self.layer, -2, tower, field="layer")


def _row_ranks(scores: Tensor, tokens: VisualTokens) -> Tensor:
    """The rank of each token's row of its tile among all rows, by the row's mean score: (N,)."""
    tiles, patches = tokens.tiling.tiles, by_tile(tokens.tiling, scores.device)
    parts = scores[patches].split([tile.num_patches for tile in tiles])
    rows = [
        reduce(p, "(r c) -> r", "mean", r=tile.rows) for p, tile in zip(parts, tiles, strict=True)
    ]
    means = torch.cat(rows)
    ranks = top_k(means, len(means)).argsort().split([tile.rows for tile in tiles])
    spread = [r.repeat_interleave(t.columns) for r, t in zip(ranks, tiles, strict=True)]
    return torch.cat(spread)[patches.argsort()]

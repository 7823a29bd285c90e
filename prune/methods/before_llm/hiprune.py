"""HiPrune: keep the objects seen by a middle ViT layer, their neighbours, and late-layer registers.

Reference: HiPrune: Training-Free Visual Token Pruning via Hierarchical Attention in
    Vision-Language Models, arXiv 2508.00553.
Upstream: Danielement321/HiPrune, LLaVA/llava/model/llava_arch.py (encode_images) and
    Qwen2_5_VL/qwen2_5_vl_HiPrune.py (forward), commit 6e83a1240874e99a25df34f54221a29bb24b7bc2.
Differs: anchors and buffers are excluded from the registers. On encoders that merge patches the
    official code subtracts 1 from scores whose mean is 1, picks some of them twice and keeps too
    few.
    At most keep // 5 anchors, so that they and their buffers fit; official code crashes there
    (small counts with alpha near 1 only).
    Layers scale with the depth of other encoders; an encoder without CLS that merges nothing has
    no official rule and follows the one with CLS.
    As published: a buffer left or right of an anchor may lie in the next row, and one above or
    below the image falls on its first or last token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...batches import InOnePass, ranked, stacked
from ...contract import ModelShape, ReceivedAttention, Selection, Signal, Tower, VisualTokens
from ...fields import check_fraction, check_layer
from ...layers import encoder_layer
from ...ops.parts import on_device
from ...ops.topk import ascending, top_k
from ...registry import register


@register("hiprune")
@dataclass(frozen=True, kw_only=True)
class HiPrune(InOnePass):
    """Anchors and buffers (share `alpha` of the budget) from one layer, registers from another.

    Recorded scores are those of the registers: anchors and buffers stay whatever they are.
    `object_layer` and `deep_layer` are ViT layer indices; None takes the published ones: 8 and -2
    of 24, or 15 and -1 of 32 on an encoder that merges patches.
    """

    needs_grid: ClassVar[bool] = True
    retired: ClassVar[Mapping[str, object]] = {"official": False}

    alpha: float = 0.1
    object_layer: int | None = None
    deep_layer: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fraction("alpha", self.alpha)
        check_layer("object_layer", self.object_layer)
        check_layer("deep_layer", self.deep_layer)

    def needs(self, shape: ModelShape) -> tuple[Signal, ...]:
        return tuple(dict.fromkeys(self._signals(shape.tower)))

    def select_equal(self, images: Sequence[VisualTokens], keep: int) -> list[Selection]:
        tower = images[0].shape.tower
        objects, deep = (stacked(images, signal) for signal in self._signals(tower))
        anchors = top_k(objects, min(round(keep * self.alpha / 5), keep // 5))
        columns = on_device([tokens.grid[1] for tokens in images], deep.device)
        certain = _with_neighbours(anchors, columns[:, None], deep.shape[1])
        return self._filled(certain, deep, keep)

    def _filled(self, certain: Tensor, deep: Tensor, keep: int) -> list[Selection]:
        """The tokens that are `certain` (B, N), and registers by their scores `deep` (B, N)."""
        kept = ascending(top_k(deep.masked_fill(certain, torch.inf), keep))
        return list(map(ranked, kept, deep))

    def _signals(self, tower: Tower) -> tuple[ReceivedAttention, ReceivedAttention]:
        if tower.merge_unit > 1:
            objects = encoder_layer(
                self.object_layer, 15, tower, depth_published=32, field="object_layer"
            )
            deep = encoder_layer(self.deep_layer, -1, tower, field="deep_layer")
        else:
            objects = encoder_layer(self.object_layer, 8, tower, field="object_layer")
            deep = encoder_layer(self.deep_layer, -2, tower, field="deep_layer")
        return ReceivedAttention(objects), ReceivedAttention(deep)


def _with_neighbours(anchors: Tensor, columns: Tensor, num_tokens: int) -> Tensor:
    """Mask (B, N) of the anchors (B, k) and their four neighbours on flattened grids, which have
    `columns` (B, 1)."""
    neighbours = [anchors + step for step in (0, -1, 1, -columns, columns)]
    mask = torch.zeros(len(anchors), num_tokens, dtype=torch.bool, device=anchors.device)
    return mask.scatter(1, torch.cat(neighbours, 1).clamp(0, num_tokens - 1), True)

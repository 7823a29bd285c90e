"""What a pass of a classifier costs: FLOPs as torch counts them, and rows that enter its blocks."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ...adapters.handle import Handle
from ...adapters.image_models import image_model_of
from ..results.records import PictureTokens
from .classifier import Classifier

_FUSED_ON_A_CPU = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def counting() -> FlopCounterMode:
    """Torch's counter, which before torch 2.15 counts 0 for the fused attention of a CPU."""
    return FlopCounterMode(display=False, custom_mapping={_FUSED_ON_A_CPU: _fused_on_a_cpu})


def flops_of(classifier: Classifier, batch: Tensor) -> float:
    """FLOPs of a picture: multiply-add = 2; matrix products, convolutions and attention."""
    with counting() as counter:
        classifier.logits(batch)
    return float(counter.get_total_flops()) / len(batch)


def _fused_on_a_cpu(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """Of `q k^T` and `p v`, from shapes (B, H, L, D); key and value may have fewer heads."""
    return int(2 * query[:-1].numel() * key[-2] * (query[-1] + value[-1]))


class Patches:
    """Counts the patches of pictures that enter each block of an encoder, and are left behind it.

    Of a model that is no encoder with patches nothing is counted.
    """

    def __init__(self, model: nn.Module) -> None:
        self._encoder = image_model_of(model)
        self._rows: list[list[float]] = []
        self._total: list[int] = []
        self._kept: list[int] = []

    def add(self, pixels: Tensor, handle: Handle | None) -> list[int]:
        """The pass that has just ended, of pictures (B, 3, H, W).

        Returns:
            patches or groups left of each picture; empty where nothing is counted.
        """
        if self._encoder is None:
            return []
        rows, columns = self._encoder.grid(pixels)
        total, depth = rows * columns, len(self._encoder.encoder.blocks)
        last = None if handle is None else handle.last
        entering = [] if last is None else last.encoder
        kept = [total] * len(pixels) if last is None else last.tokens_kept
        before = depth - len(entering)
        for number in range(len(pixels)):
            of_block = [(a[number] + b[number]) / 2 for a, b in entering]
            self._rows.append([float(total)] * before + of_block)
        self._total += [total] * len(pixels)
        self._kept += kept
        return list(kept)

    def found(self) -> PictureTokens | None:
        """Means over all pictures; None where nothing was counted."""
        if not self._rows:
            return None
        per_layer = _means(self._rows)
        return PictureTokens(
            in_per_image=fmean(self._total),
            kept_per_image=fmean(self._kept),
            average_per_layer=fmean(per_layer),
            per_layer=per_layer,
        )


def _means(rows: Sequence[Sequence[float]]) -> list[float]:
    return [fmean(column) for column in zip(*rows, strict=True)]

"""What one pass through the vision encoder showed, and the signals of images from it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...prune.contract import Signal
from ...prune.errors import VlmpruneError
from .encoder import Images
from .table import ENCODER_ATTENTION, SOURCES, shown


class Recording:
    """What the taps on encoder layers read in one pass."""

    def __init__(self) -> None:
        self._parts: dict[Signal, list[Tensor]] = {}

    def hear(
        self,
        signal: Signal,
        query: Tensor,
        key: Tensor,
        scaling: float,
        bias: Tensor | None = None,
        **kw: Any,
    ) -> None:
        """Windowed and packed encoders call attention once per segment, in sequence order.

        Args:
            bias: (B, 1, 1, S) that is added to the logits of each key.
        """
        parts = self._parts.setdefault(signal, [])
        read = SOURCES[type(signal)].read
        bounds = kw.get("cu_seq_lens_q")
        if bounds is None:
            parts.append(read(signal, query, key, scaling, bias))
            return
        sizes = bounds.diff().tolist()  # flash attention: all images in one packed sequence
        biases = [None] * len(sizes) if bias is None else bias.split(sizes, 3)
        for q, k, b in zip(query.split(sizes, 2), key.split(sizes, 2), biases, strict=True):
            parts.append(read(signal, q, k, scaling, b))

    def note(self, signal: Signal, value: Tensor) -> None:
        """A signal (B, S, ...) that is no part of attention."""
        self._parts[signal] = [value]

    def values(self, signal: Signal) -> Tensor:
        """(B, S, ...) as the attention modules saw the tokens."""
        parts = self._parts.get(signal)
        if not parts:
            raise VlmpruneError(f"The vision encoder ran without reaching the layer of {signal}.")
        return torch.cat(parts, dim=1)

    def of_images(self, images: Images, needs: Sequence[Signal]) -> list[dict[Signal, Tensor]]:
        """Per image, each of some signals, as the contract describes it."""
        columns: dict[Signal, Sequence[Tensor]] = {}
        for need in needs:
            with torch.set_grad_enabled(torch.is_grad_enabled() and need.of_rows):
                if shown(need) == ENCODER_ATTENTION:
                    values = self.values(need)
                    if images.spread is not None:
                        layer = need.layer  # type: ignore[attr-defined]
                        layer += images.family.tower.num_layers if layer < 0 else 0
                        values = images.spread(values, layer)
                    columns[need] = images.patches(values)
                else:
                    columns[need] = SOURCES[type(need)].read(images, need)
        # An encoder may be spread over several devices: choices are made where its features are.
        return [
            {need: columns[need][i].to(features.device) for need in columns}
            for i, features in enumerate(images.features)
        ]

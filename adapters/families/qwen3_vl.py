"""Qwen3-VL: Qwen2-VL whose first decoder layers get visual features of their own (deepstack)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .qwen2_vl import Qwen2VL


class Qwen3VL(Qwen2VL):
    name = "qwen3_vl"

    @property
    def projectors(self) -> Sequence[Any]:
        """The last merger, and those of features that are taken between the blocks."""
        return [*super().projectors, *self.vision_tower.deepstack_merger_list]

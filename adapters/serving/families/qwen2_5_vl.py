"""Qwen2.5-VL in vLLM: Qwen2-VL with windows in most layers of its ViT."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .mrope import GridProcessor, PrunedModel

from vllm.model_executor.models.qwen2_5_vl import (  # isort: skip  (behind the version's check)
    Qwen2_5_VLDummyInputsBuilder,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLMultiModalProcessor,
    Qwen2_5_VLProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY  # isort: skip


class Qwen25VLProcessor(GridProcessor, Qwen2_5_VLMultiModalProcessor):  # type: ignore[misc]
    pass


@MULTIMODAL_REGISTRY.register_processor(
    Qwen25VLProcessor, info=Qwen2_5_VLProcessingInfo, dummy_inputs=Qwen2_5_VLDummyInputsBuilder
)
class VlmPruneQwen2_5_VLForConditionalGeneration(
    PrunedModel,
    Qwen2_5_VLForConditionalGeneration,  # type: ignore[misc]
):
    """vLLM's Qwen2.5-VL with pruned images and videos."""

    fields = (*PrunedModel.fields, "second_per_grid_ts")

    def _in_order(self, units: Tensor, grids: Sequence[Sequence[int]]) -> Tensor:
        """The blocks run in window order; `window[i]` is the token at place i of its item."""
        found, done = [], 0
        for grid in grids:
            window = self.visual.get_rope_by_thw(*grid)[2].to(units.device)
            found.append(units[done : done + len(window)][window.argsort()])
            done += len(window)
        return torch.cat(found)

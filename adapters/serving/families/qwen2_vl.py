"""Qwen2-VL in vLLM: patches of any size in one row, M-RoPE, videos."""

from __future__ import annotations

from .mrope import GridProcessor, PrunedModel

from vllm.model_executor.models.qwen2_vl import (  # isort: skip  (behind the version's check)
    Qwen2VLDummyInputsBuilder,
    Qwen2VLForConditionalGeneration,
    Qwen2VLMultiModalProcessor,
    Qwen2VLProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY  # isort: skip


class Qwen2VLProcessor(GridProcessor, Qwen2VLMultiModalProcessor):  # type: ignore[misc]
    pass


@MULTIMODAL_REGISTRY.register_processor(
    Qwen2VLProcessor, info=Qwen2VLProcessingInfo, dummy_inputs=Qwen2VLDummyInputsBuilder
)
class VlmPruneQwen2VLForConditionalGeneration(PrunedModel, Qwen2VLForConditionalGeneration):  # type: ignore[misc]
    """vLLM's Qwen2-VL with pruned images and videos."""

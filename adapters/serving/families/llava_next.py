"""LLaVA-NeXT in vLLM: a thumbnail and crops, a newline a row."""

from __future__ import annotations

from .tiled import TiledModel, TiledProcessor

from vllm.model_executor.models.llava_next import (  # isort: skip  (behind the version's check)
    LlavaDummyInputsBuilder,
    LlavaNextForConditionalGeneration,
    LlavaNextMultiModalProcessor,
    LlavaNextProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY  # isort: skip


class LlavaNextProcessor(TiledProcessor, LlavaNextMultiModalProcessor):  # type: ignore[misc]
    pass


@MULTIMODAL_REGISTRY.register_processor(
    LlavaNextProcessor, info=LlavaNextProcessingInfo, dummy_inputs=LlavaDummyInputsBuilder
)
class VlmPruneLlavaNextForConditionalGeneration(TiledModel, LlavaNextForConditionalGeneration):  # type: ignore[misc]
    """vLLM's LLaVA-NeXT with pruned images."""

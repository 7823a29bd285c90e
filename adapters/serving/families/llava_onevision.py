"""LLaVA-OneVision in vLLM: SigLIP, tiles that are scaled down to nine, videos."""

from __future__ import annotations

from ..versions import check_version
from .tiled import TiledModel, TiledProcessor

from vllm.model_executor.models.llava_onevision import (  # isort: skip  (behind the version's check)
    LlavaOnevisionDummyInputsBuilder,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionMultiModalProcessor,
    LlavaOnevisionProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY  # isort: skip

check_version(since=(0, 32))  # the transformers beside 0.31 has other videos to compare with


class OnevisionProcessor(TiledProcessor, LlavaOnevisionMultiModalProcessor):  # type: ignore[misc]
    pass


@MULTIMODAL_REGISTRY.register_processor(
    OnevisionProcessor,
    info=LlavaOnevisionProcessingInfo,
    dummy_inputs=LlavaOnevisionDummyInputsBuilder,
)
class VlmPruneLlavaOnevisionForConditionalGeneration(
    TiledModel,
    LlavaOnevisionForConditionalGeneration,  # type: ignore[misc]
):
    """vLLM's LLaVA-OneVision with pruned images and videos."""

"""Qwen3.5 in vLLM: Qwen3-VL's encoder, and a decoder most of whose layers keep a state."""

from __future__ import annotations

from ..versions import check_version
from .qwen3_vl import Timestamped, TimestampedProcessor

from vllm.model_executor.models.qwen3_5 import (  # isort: skip  (behind the version's check)
    Qwen3_5ForConditionalGeneration,
    Qwen3_5ProcessingInfo,
)
from vllm.model_executor.models.qwen3_vl import Qwen3VLDummyInputsBuilder  # isort: skip
from vllm.multimodal import MULTIMODAL_REGISTRY  # isort: skip

check_version(since=(0, 32))  # the transformers beside 0.31 cannot make one to compare with


@MULTIMODAL_REGISTRY.register_processor(
    TimestampedProcessor, info=Qwen3_5ProcessingInfo, dummy_inputs=Qwen3VLDummyInputsBuilder
)
class VlmPruneQwen3_5ForConditionalGeneration(Timestamped, Qwen3_5ForConditionalGeneration):  # type: ignore[misc]
    """vLLM's Qwen3.5 with pruned images and videos."""

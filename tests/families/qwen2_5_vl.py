"""What tests need of Qwen2.5-VL: its tiny model, and its real processor."""

from __future__ import annotations

import transformers
from families.qwen2_vl import MARKS as MARKS
from families.qwen2_vl import processor_of

CASES = ("qwen2_5_vl",)
ONE = "qwen2_5_vl"


def processor() -> transformers.ProcessorMixin:
    """The real processor, for the tiny models."""
    return processor_of("Qwen2_5_VLProcessor", "Qwen2VLVideoProcessor")

"""What tests need of Qwen3-VL: its tiny model, and its real processor."""

from __future__ import annotations

import transformers
from families.qwen2_vl import MARKS as MARKS
from families.qwen2_vl import processor_of

CASES = ("qwen3_vl",)
ONE = "qwen3_vl"


def processor() -> transformers.ProcessorMixin:
    """The real processor, for the tiny models."""
    return processor_of("Qwen3VLProcessor", "Qwen3VLVideoProcessor")

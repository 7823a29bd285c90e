"""What tests need of Qwen2-VL: its tiny model, and its real processor."""

from __future__ import annotations

import transformers
from kit.words import FRAMED as MARKS
from kit.words import tokenizer

CASES = ("qwen2_vl",)
ONE = None  # where one of a family is enough, Qwen2.5-VL asks all that it does


def processor_of(processor: str, videos: str) -> transformers.ProcessorMixin:
    """One of the processors of this line, for the tiny models."""
    options = {
        "patch_size": 4,
        "merge_size": 2,
        "temporal_patch_size": 2,
        "size": {"shortest_edge": 64, "longest_edge": 2560},
        "do_sample_frames": False,
    }
    return getattr(transformers, processor)(
        transformers.Qwen2VLImageProcessor(**options),
        tokenizer(MARKS),
        getattr(transformers, videos)(**options),
    )


def processor() -> transformers.ProcessorMixin:
    """The real processor, for the tiny models."""
    return processor_of("Qwen2VLProcessor", "Qwen2VLVideoProcessor")

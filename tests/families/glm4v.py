"""What tests need of GLM-4.1V: its tiny model, and its real processor."""

from __future__ import annotations

import transformers
from kit.words import FRAMES_AS_IMAGES as MARKS
from kit.words import tokenizer

CASES = ("glm4v",)
ONE = "glm4v"


def processor_of(line: str) -> transformers.ProcessorMixin:
    """One of the processors of this line, for the tiny models."""
    size = {"shortest_edge": 64, "longest_edge": 2560}
    options = {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 2, "size": size}
    return getattr(transformers, f"{line}Processor")(
        getattr(transformers, f"{line}ImageProcessor")(**options),
        tokenizer(MARKS),
        getattr(transformers, f"{line}VideoProcessor")(**options, do_sample_frames=False),
    )


def processor() -> transformers.ProcessorMixin:
    """The real processor, for the tiny models."""
    return processor_of("Glm4v")

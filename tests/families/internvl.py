"""What tests need of InternVL: its tiny model, and its real processor."""

from __future__ import annotations

import transformers
from kit.words import tokenizer
from vlmprune.eval.models.tiny_layouts import PIXELS

CASES = ("internvl",)
ONE = None
MARKS = {
    "image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
}


def processor() -> transformers.ProcessorMixin:
    """The real processor, for the tiny models."""
    size = {"height": PIXELS, "width": PIXELS}
    return transformers.InternVLProcessor(
        transformers.GotOcr2ImageProcessor(size=size, min_patches=1, max_patches=6),
        tokenizer(MARKS),
        transformers.InternVLVideoProcessor(size=size, do_sample_frames=False),
        image_seq_length=9,
    )

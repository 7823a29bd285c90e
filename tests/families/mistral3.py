"""What tests need of Mistral 3: its tiny model, and its real processor."""

from __future__ import annotations

import transformers
from kit.words import tokenizer

CASES = ("mistral3",)
ONE = None
MARKS = {
    "image_token": "[IMG]",
    "video_token": "<video>",
    "vision_bos_token": "[IMG_BREAK]",
    "vision_eos_token": "[IMG_END]",
}


def processor() -> transformers.ProcessorMixin:
    """The real processor, for the tiny models."""
    images = transformers.PixtralImageProcessor(size={"longest_edge": 64}, patch_size=4)
    return transformers.PixtralProcessor(
        images, tokenizer(MARKS), patch_size=4, spatial_merge_size=2
    )

"""What tests need of LLaVA-NeXT-Video: its tiny model, and its real processor."""

from __future__ import annotations

import transformers
from kit.words import PLAIN as MARKS
from kit.words import tokenizer
from vlmprune.eval.models.tiny_layouts import PINPOINTS, PIXELS

CASES = ("llava_next_video",)
ONE = "llava_next_video"


def processor() -> transformers.ProcessorMixin:
    """The real processor, for the tiny models."""
    size = {"size": {"shortest_edge": PIXELS}, "crop_size": {"height": PIXELS, "width": PIXELS}}
    images = transformers.LlavaNextImageProcessor(**size, image_grid_pinpoints=PINPOINTS)
    return transformers.LlavaNextVideoProcessor(
        transformers.LlavaNextVideoVideoProcessor(**size),
        images,
        tokenizer(MARKS),
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )

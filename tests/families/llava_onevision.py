"""What tests need of LLaVA-OneVision: its tiny model, and its real processor."""

from __future__ import annotations

import transformers
from kit.words import PLAIN as MARKS
from kit.words import tokenizer
from vlmprune.eval.models.families.llava_onevision import ASPECT_RATIO
from vlmprune.eval.models.tiny_layouts import PINPOINTS, PIXELS, SIDE

CASES = ("llava_onevision",)
ONE = "llava_onevision"


def processor() -> transformers.ProcessorMixin:
    """The real processor, for the tiny models."""
    size = {"height": PIXELS, "width": PIXELS}
    images = transformers.LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=PINPOINTS)
    return transformers.LlavaOnevisionProcessor(
        images,
        tokenizer(MARKS),
        transformers.LlavaOnevisionVideoProcessor(size=size),
        num_image_tokens=SIDE**2,
        vision_feature_select_strategy="full",
        vision_aspect_ratio=ASPECT_RATIO,
    )

"""What tests need of LLaVA-1.5: its tiny models, and its real processor."""

from __future__ import annotations

import transformers
from kit.words import PLAIN as MARKS
from kit.words import tokenizer
from vlmprune.eval.models.families.llava import CLIP, clip_mistral
from vlmprune.eval.models.tiny_layouts import PIXELS
from vlmprune.eval.models.tiny_models import Case

CASES = ("llava-clip-llama", "llava-clip-mistral", "llava-siglip-qwen2")
ONE = "llava-clip-llama"
"""Where one of a family is enough."""
COLUMNS = {"llava (CLIP)": "llava-clip-llama", "llava (SigLIP)": "llava-siglip-qwen2"}
"""Models on which methods run differently, as the table of support calls them."""
SLIDING = Case("llava-clip-mistral-sliding", lambda: clip_mistral(20), CLIP)
"""Windows shorter than the prompts: tokens drop out of sight, and of the cache."""


def processor() -> transformers.ProcessorMixin:
    """The real processor, for the tiny models."""
    side = {"height": PIXELS, "width": PIXELS}
    images = transformers.CLIPImageProcessor(size={"shortest_edge": PIXELS}, crop_size=side)
    return transformers.LlavaProcessor(
        images,
        tokenizer(MARKS),
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )

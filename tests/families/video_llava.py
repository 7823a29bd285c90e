"""What tests need of Video-LLaVA: its tiny model, and its real processor."""

from __future__ import annotations

import torch
import transformers
from kit.words import PLAIN as MARKS
from kit.words import tokenizer
from vlmprune.eval.models.tiny_layouts import PIXELS

CASES = ("video_llava",)
ONE = "video_llava"
EACH_FRAME = True
"""The encoder gives a row of the batch for each frame of a video."""


def processor() -> transformers.ProcessorMixin:
    """The real processor, for the tiny models."""
    side = {"height": PIXELS, "width": PIXELS}
    size = {"size": {"shortest_edge": PIXELS}, "crop_size": side}
    return transformers.VideoLlavaProcessor(
        transformers.VideoLlavaImageProcessor(**size),
        transformers.VideoLlavaVideoProcessor(**size),
        tokenizer(MARKS),
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def of_tokens(core, values: torch.Tensor, mean: bool) -> torch.Tensor:
    """Those of all frames."""
    return values.flatten(0, 1)

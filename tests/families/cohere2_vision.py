"""What tests need of Command A Vision: its tiny models, and its real processor."""

from __future__ import annotations

import torch
import transformers
from kit.cells import shuffled
from kit.words import tokenizer
from vlmprune.eval.models.families.cohere2_vision import LAYOUT, SHUFFLING, tiny_cohere2
from vlmprune.eval.models.tiny_layouts import PIXELS
from vlmprune.eval.models.tiny_models import Case

CASES = ("cohere2_vision",)
ONE = "cohere2_vision"
EACH_TILE = True
"""Alone, the encoder takes each tile for an image."""
UNTURNED = "full_attention"
"""The kind of layers in which no position differs from another."""
BY_MODULES = True
"""Neighbours are turned together: attention is read off its modules."""
MARKS = {
    "image_token": "<|IMG_PATCH|>",
    "video_token": "<video>",
    "boi_token": "<|START_OF_IMG|>",
    "eoi_token": "<|END_OF_IMG|>",
    "img_line_break_token": "<|IMG_LINE_BREAK|>",
}
WINDOWED = Case("cohere2_vision-windowed", lambda: tiny_cohere2(12), SHUFFLING, LAYOUT)
"""Windows shorter than the prompts, and layers between them without any positions."""


def processor() -> transformers.ProcessorMixin:
    """The real processor, for the tiny models."""
    size = {"height": PIXELS, "width": PIXELS}
    images = transformers.Cohere2VisionImageProcessor(size=size, max_patches=6, patch_size=3)
    return transformers.Cohere2VisionProcessor(images, tokenizer(MARKS))


def projected(core, rows: torch.Tensor) -> torch.Tensor:
    """It shuffles patches in its projector."""
    projector = core.multi_modal_projector
    own, gate = projector.linear_1(rows).chunk(2, -1)
    return projector.linear_2(projector.act(gate) * own)


def of_tokens(core, values: torch.Tensor, mean: bool) -> torch.Tensor:
    """As its projector shuffles them."""
    return shuffled(core.multi_modal_projector.pixel_shuffle(values).flatten(0, 2), mean)

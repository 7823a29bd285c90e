"""What tests need of LFM2-VL: its tiny model, and its real processor."""

from __future__ import annotations

import torch
import transformers
from kit.words import tokenizer

CASES = ("lfm2_vl",)
ONE = None
EACH_TILE = True
"""Alone, the encoder takes each tile for an image."""
BY_MODULES = True
"""Its layers have names of their own: attention is read off their modules."""
MARKS = {"image_token": "<image>", "video_token": "<video>"}


def processor() -> transformers.ProcessorMixin:
    """The real processor, for the tiny models: pictures of 4 to 16 tokens, or up to 6 tiles."""
    words = {"image_start_token": "<|image_start|>", "image_end_token": "<|image_end|>"}
    images = transformers.Lfm2VlImageProcessor(
        encoder_patch_size=4,
        tile_size=24,
        min_image_tokens=4,
        max_image_tokens=9,
        max_tiles=6,
    )
    return transformers.Lfm2VlProcessor(images, tokenizer({**MARKS, **words}))


def projected(core, rows: torch.Tensor) -> torch.Tensor:
    """A picture of one token for each."""
    return core.multi_modal_projector(rows.unflatten(1, (2, 2, -1))).flatten(1)

"""What tests need of InternVL: its tiny model, and its real processor."""

from __future__ import annotations

import math

import torch
import transformers
from kit.cells import shuffled
from kit.words import tokenizer
from vlmprune.eval.models.tiny_layouts import PIXELS

CASES = ("internvl",)
ONE = None
EACH_TILE = True
"""Alone, the encoder takes each tile for an image."""
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


def of_tokens(core, values: torch.Tensor, mean: bool) -> torch.Tensor:
    """As the model itself shuffles squares of them."""
    side = math.isqrt(values.shape[1])
    squares = core.pixel_shuffle(values.unflatten(1, (side, side)), scale_factor=0.5)
    return shuffled(squares.flatten(0, 2), mean)

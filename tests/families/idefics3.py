"""What tests need of Idefics 3: its tiny model, and its real processor."""

from __future__ import annotations

import torch
import transformers
from kit.cells import shuffled
from kit.words import tokenizer
from vlmprune.eval.models.tiny_layouts import PIXELS

CASES = ("idefics3",)
ONE = None
EACH_TILE = True
"""Alone, the encoder takes each tile for an image."""
MARKS = {
    "image_token": "<image>",
    "video_token": "<video>",
    "fake_image_token": "<fake_token_around_image>",
    "end_of_utterance_token": "<end_of_utterance>",
    "global_image_token": "<global-img>",
}
SIZES = {"size": {"longest_edge": 3 * PIXELS}, "max_image_size": {"longest_edge": PIXELS}}


def processor() -> transformers.ProcessorMixin:
    """The real processor, for the tiny models."""
    images = transformers.Idefics3ImageProcessor(**SIZES)
    return transformers.Idefics3Processor(images, tokenizer(MARKS), image_seq_len=9)


def of_tokens(core, values: torch.Tensor, mean: bool) -> torch.Tensor:
    """As its connector shuffles them."""
    return shuffled(core.connector.pixel_shuffle(values, scale_factor=2).flatten(0, 1), mean)

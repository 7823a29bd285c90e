"""What tests need of SmolVLM: its tiny model, and its real processor."""

from __future__ import annotations

import torch
import transformers
from families.idefics3 import MARKS as MARKS
from families.idefics3 import SIZES
from kit.cells import shuffled
from kit.words import tokenizer
from transformers.models.smolvlm import processing_smolvlm

CASES = ("smolvlm",)
ONE = None
EACH_TILE = True
"""Alone, the encoder takes each tile for an image."""


def processor() -> transformers.ProcessorMixin:
    """The real processor, for the tiny models; numbers of frames are digits where the package that
    spells them out is missing."""
    processing_smolvlm.num2words = processing_smolvlm.num2words or str
    return transformers.SmolVLMProcessor(
        transformers.SmolVLMImageProcessor(**SIZES),
        tokenizer(MARKS),
        transformers.SmolVLMVideoProcessor(**SIZES),
        image_seq_len=9,
    )


def of_tokens(core, values: torch.Tensor, mean: bool) -> torch.Tensor:
    """As its connector shuffles them."""
    return shuffled(core.connector.pixel_shuffle(values, scale_factor=2).flatten(0, 1), mean)

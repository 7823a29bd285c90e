"""What tests need of SmolVLM: its tiny model, and its real processor."""

from __future__ import annotations

import transformers
from families.idefics3 import MARKS as MARKS
from families.idefics3 import SIZES
from kit.words import tokenizer
from transformers.models.smolvlm import processing_smolvlm

CASES = ("smolvlm",)
ONE = None


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

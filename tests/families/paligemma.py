"""What tests need of PaliGemma: its tiny models, and its real processor."""

from __future__ import annotations

import transformers
from kit.words import PLAIN as MARKS
from kit.words import tokenizer
from vlmprune.eval.models.families.paligemma import SIGLIP, Asked, tiny_paligemma2
from vlmprune.eval.models.tiny_layouts import PIXELS, SIDE
from vlmprune.eval.models.tiny_models import Case

CASES = ("paligemma",)
ONE = "paligemma"
TYPES = "token_type_ids"
"""The argument that says which tokens see each other both ways."""
FIRST_POSITION = 1
"""Of a prompt's first token."""
CAPPED = Case("paligemma2", tiny_paligemma2, SIGLIP, Asked())
"""Logits are capped, which sdpa refuses to do: eager attention only."""
WINDOWED = Case("paligemma2-windowed", lambda: tiny_paligemma2(20), SIGLIP, Asked())
"""Windows shorter than the prompts, beyond which what is no answer is seen all the same."""


def processor() -> transformers.ProcessorMixin:
    """The real processor, for the tiny models."""
    words = tokenizer(MARKS)
    words.bos_token, words.eos_token = "w1", "w2"
    size = {"height": PIXELS, "width": PIXELS}
    images = transformers.SiglipImageProcessor(size=size, do_convert_rgb=True)
    images.image_seq_length = SIDE**2
    return transformers.PaliGemmaProcessor(images, words)

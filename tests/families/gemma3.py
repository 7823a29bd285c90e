"""What tests need of Gemma 3: its tiny models, and its real processor."""

from __future__ import annotations

import torch
import transformers
from kit.cells import averaged
from kit.words import tokenizer
from vlmprune.eval.models.families.gemma3 import AVERAGING, Averaged, tiny_gemma3
from vlmprune.eval.models.tiny_layouts import PIXELS, SIDE
from vlmprune.eval.models.tiny_models import Case

CASES = ("gemma3",)
ONE = "gemma3"
TYPES = "token_type_ids"
"""The argument that says which tokens see each other both ways."""
MARKS = {"image_token": "<start_of_image>", "video_token": "<video>"}
"""What stands for an image in a prompt."""
WINDOWED = Case("gemma3-windowed", lambda: tiny_gemma3(12), AVERAGING, Averaged())
"""Windows shorter than the prompts, beyond which nothing is seen, ahead in an image as before."""


def processor() -> transformers.ProcessorMixin:
    """The real processor, for the tiny models."""
    marks = {"boi_token": MARKS["image_token"], "eoi_token": "<end_of_image>"}
    words = tokenizer({"image_token": "<image_soft_token>", **marks})
    images = transformers.Gemma3ImageProcessor(size={"height": PIXELS, "width": PIXELS})
    return transformers.Gemma3Processor(images, words, image_seq_length=(SIDE // 2) ** 2)


def projected(core, rows: torch.Tensor) -> torch.Tensor:
    """It averages before a norm."""
    projector = core.multi_modal_projector
    tokens = projector.mm_soft_emb_norm(rows.unflatten(1, (4, -1)).mean(1))
    return tokens @ projector.mm_input_projection_weight


def of_tokens(core, values: torch.Tensor, mean: bool) -> torch.Tensor:
    """Of 2 x 2 patches each."""
    return averaged(values, mean)

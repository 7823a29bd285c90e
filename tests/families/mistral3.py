"""What tests need of Mistral 3: its tiny model, and its real processor."""

from __future__ import annotations

import torch
import transformers
from kit.words import tokenizer

CASES = ("mistral3",)
ONE = None
MARKS = {
    "image_token": "[IMG]",
    "video_token": "<video>",
    "vision_bos_token": "[IMG_BREAK]",
    "vision_eos_token": "[IMG_END]",
}


def processor() -> transformers.ProcessorMixin:
    """The real processor, for the tiny models."""
    images = transformers.PixtralImageProcessor(size={"longest_edge": 64}, patch_size=4)
    return transformers.PixtralProcessor(
        images, tokenizer(MARKS), patch_size=4, spatial_merge_size=2
    )


def projected(core, rows: torch.Tensor) -> torch.Tensor:
    """A picture of one token for each."""
    sizes = torch.full((len(rows), 2), 8)
    return core.multi_modal_projector(rows.view(-1, rows.shape[-1] // 4), sizes)

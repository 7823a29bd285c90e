"""What tests need of Ovis 2: its tiny model, and its real processor."""

from __future__ import annotations

import torch
import transformers
from kit.cells import averaged
from kit.words import tokenizer
from vlmprune.eval.models.tiny_layouts import PIXELS

CASES = ("ovis2",)
ONE = None
EACH_TILE = True
"""Alone, the encoder takes each tile for an image."""
MARKS = {
    "image_token": "<image>",  # of a prompt; what the processor makes of it:
    "context_image_token": "<IMG_ATOM>",
    "video_token": "<video>",
    "start_image_token": "<IMG_START>",
    "end_image_token": "<IMG_END>",
    "global_image_token": "<IMG_GRID>",
    "column_token": "<IMG_COL>",
    "row_token": "<IMG_ROW>",
}


def processor() -> transformers.ProcessorMixin:
    """The real processor, for the tiny models."""
    size = {"height": PIXELS, "width": PIXELS}
    images = transformers.Ovis2ImageProcessor(size=size, crop_to_patches=True, max_patches=6)
    return transformers.Ovis2Processor(images, tokenizer(MARKS), image_seq_length=9)


def projected(core, rows: torch.Tensor) -> torch.Tensor:
    """Shares of the words that are no marks, each with its embedding."""
    tower, table = core.vision_tower, core.visual_embeddings_table.weight
    shares = tower.head_norm(tower.head_linear(rows)).softmax(-1)
    return shares @ table[: shares.shape[1]]


def of_tokens(core, values: torch.Tensor, mean: bool) -> torch.Tensor:
    """Of 2 x 2 patches each."""
    return averaged(values, mean)

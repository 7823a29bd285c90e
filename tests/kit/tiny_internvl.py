"""A tiny random InternVL saved as vLLM reads it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from families.internvl import processor as usual_processor
from vlmprune.eval.models.tiny_layouts import DECODER, IMAGE, PIXELS, TOWER


def processor() -> Any:
    """Tiles at once, as vLLM asks for them."""
    built = usual_processor()
    built.image_processor.crop_to_patches = True
    return built


def config() -> transformers.InternVLConfig:
    """Nine tokens a tile; heads of 32, which all attention kernels of CPUs have."""
    vision = {
        **TOWER,
        "hidden_size": 64,
        "num_attention_heads": 2,
        "image_size": [PIXELS] * 2,
        "patch_size": [TOWER["patch_size"]] * 2,
    }
    text = {**DECODER, "num_attention_heads": 2, "num_key_value_heads": 2}
    return transformers.InternVLConfig(
        vision_config={**vision, "attention_bias": True},
        text_config=transformers.Qwen2Config(**text),
        image_token_id=IMAGE,
        image_seq_length=9,
    )


def save(folder: Path) -> None:
    torch.manual_seed(0)
    model = transformers.InternVLForConditionalGeneration(config()).eval()
    for weight in model.parameters():  # far from ties
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.15)
    model.save_pretrained(folder)
    processor().save_pretrained(folder)

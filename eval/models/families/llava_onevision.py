"""LLaVA-OneVision: tiles of SigLIP, a large canvas scaled down, and Qwen2."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from transformers import LlavaOnevisionConfig, Qwen2Config, SiglipVisionConfig

from ..family import Pixels, Shape
from .llava_next import LlavaNext

_PINPOINTS = [[384 * r, 384 * c] for r in range(1, 7) for c in range(1, 7)]


def _siglip(width: int = 1152, layers: int = 26, mlp: int = 4304) -> SiglipVisionConfig:
    """SigLIP-SO400M/384 without its last layer, as LLaVA-OneVision has it, at its defaults."""
    return SiglipVisionConfig(
        hidden_size=width,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=width // 72 if width % 72 == 0 else width // 64,
        image_size=384,
        patch_size=14,
        vision_use_head=False,
    )


def _qwen2(width: int, mlp: int, layers: int, key_heads: int) -> Qwen2Config:
    return Qwen2Config(
        vocab_size=152000,
        hidden_size=width,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=width // 128,
        num_key_value_heads=key_heads,
    )


def _onevision(vision: Any, text: Any) -> LlavaOnevisionConfig:
    return LlavaOnevisionConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=151646,
        video_token_id=151647,
        image_grid_pinpoints=_PINPOINTS,
    )


class LlavaOnevision(LlavaNext):
    shapes = (
        Shape(
            "llava-onevision-7b",
            lambda: _onevision(_siglip(), _qwen2(3584, 18944, 28, 4)),
            (768, 768),
        ),
    )
    small_shapes = (
        Shape(
            "llava-onevision-small",
            lambda: _onevision(_siglip(576, 12, 2152), _qwen2(1024, 2752, 12, 4)),
            (384, 384),
        ),
    )

    def pixels(self, config: Any, picture: tuple[int, int], batch_size: int, device: str) -> Pixels:
        made = super().pixels(config, picture, batch_size, device)
        images = torch.ones(batch_size, dtype=torch.long)
        return dataclasses.replace(made, inputs=made.inputs | {"batch_num_images": images})

    def canvas(self, config: Any, patches: int, rows: int, columns: int) -> tuple[int, int]:
        most = getattr(config, "vision_aspect_ratio", "").removeprefix("anyres_max_")
        if not most.isdigit():
            return rows, columns
        ratio = (rows * columns / (int(most) * patches**2)) ** 0.5
        return (int(rows // ratio), int(columns // ratio)) if ratio > 1.1 else (rows, columns)

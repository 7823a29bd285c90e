"""LLaVA-OneVision: tiles of SigLIP, a large canvas scaled down, and Qwen2."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers import LlavaOnevisionConfig, Qwen2Config, SiglipVisionConfig

from ....prune.tiling import Block, Tiling
from ..family import Pixels, Shape
from ..tiny_layouts import (
    DECODER,
    FRAMES,
    IMAGE,
    PINPOINTS,
    SIDE,
    TOWER,
    VIDEO,
    Row,
    images,
)
from ..tiny_models import Case
from .llava import SIGLIP
from .llava_next import LlavaNext
from .llava_next_video import TilesAndFrames

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


class _TilesAndVideos(TilesAndFrames):
    """One of several images is plain with one newline; so is a video."""

    resampled = "CDVW"

    def tiling(self, image: str, alone: bool) -> Tiling:
        if image in FRAMES:
            frames = super().tiling(image, alone).blocks
            return Tiling((*frames[:-1], replace(frames[-1], newline="end")))
        if not alone:
            return Tiling((Block((SIDE,), (SIDE,), "end"),))
        return super().tiling(image, alone)

    def extra(self, rows: Sequence[Row], ids: torch.Tensor) -> dict[str, Any]:
        inputs = super().extra(rows, ids)
        stills = [sum(name not in FRAMES for name in images([row])) for row in rows]
        if any(stills):  # the processor leaves out rows without images
            inputs["batch_num_images"] = torch.tensor([n for n in stills if n])
        return inputs


_TINY = _TilesAndVideos(
    {  # 114, 96, 102 and 96 tokens where they are alone; C and D are scaled down
        "A": ((24, 50), Block((6,), (3, 6, 3), "rows")),
        "B": ((48, 16), Block((6, 6), (4,), "rows")),
        "C": ((30, 48), Block((3, 3), (5, 5), "rows")),
        "D": ((24, 72), Block((4,), (5, 4, 5), "rows")),
    }
)
ASPECT_RATIO = "anyres_max_2"
"""More than 87 patches are scaled down to 72: as anyres_max_9 does it, on fewer tiles."""


def _tiny_onevision() -> LlavaOnevisionConfig:
    return LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(**TOWER, vision_use_head=False),
        text_config=Qwen2Config(**DECODER, num_key_value_heads=2),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_grid_pinpoints=PINPOINTS,
        vision_aspect_ratio=ASPECT_RATIO,
    )


class LlavaOnevision(LlavaNext):
    flat_pictures = True
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
    tiny = (Case("llava_onevision", _tiny_onevision, SIGLIP, _TINY, checked=True),)

    def pixels(self, config: Any, picture: tuple[int, int], batch_size: int, device: str) -> Pixels:
        made = super().pixels(config, picture, batch_size, device)
        images = torch.ones(batch_size, dtype=torch.long)
        return replace(made, inputs=made.inputs | {"batch_num_images": images})

    def canvas(self, config: Any, patches: int, rows: int, columns: int) -> tuple[int, int]:
        most = getattr(config, "vision_aspect_ratio", "").removeprefix("anyres_max_")
        if not most.isdigit():
            return rows, columns
        ratio = (rows * columns / (int(most) * patches**2)) ** 0.5
        return (int(rows // ratio), int(columns // ratio)) if ratio > 1.1 else (rows, columns)

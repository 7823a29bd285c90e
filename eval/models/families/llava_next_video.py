"""LLaVA-NeXT-Video: LLaVA-NeXT whose videos are frames pooled 2 x 2."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaNextVideoConfig

from ....prune.tiling import Block, Tiling
from ..family import Shape
from ..tiny_layouts import (
    DECODER,
    FRAMES,
    IMAGE,
    PINPOINTS,
    PIXELS,
    SIDE,
    TOWER,
    VIDEO,
    Row,
    Tiles,
    images,
    noise,
)
from ..tiny_models import Case
from .llava import CLIP, clip, llama
from .llava_next import CANVASES, LlavaNext


class TilesAndFrames(Tiles):
    """Tiled images, and videos of pooled frames."""

    takes_videos = True
    resampled = "VW"

    def tiling(self, image: str, alone: bool) -> Tiling:
        if image in FRAMES:
            side = SIDE // 2
            return Tiling((Block((side,), (side,)),) * FRAMES[image])
        return super().tiling(image, alone)

    def extra(self, rows: Sequence[Row], ids: torch.Tensor) -> dict[str, Any]:
        clips = [noise(n, FRAMES[n], 3, PIXELS, PIXELS) for n in images(rows) if n in FRAMES]
        videos = {"pixel_values_videos": torch.stack(clips)} if clips else {}
        return super().extra(rows, ids) | videos


def _next_video() -> LlavaNextVideoConfig:
    """LLaVA-NeXT-Video-7B."""
    return LlavaNextVideoConfig(vision_config=clip(), text_config=llama())


def _tiny() -> LlavaNextVideoConfig:
    return LlavaNextVideoConfig(
        vision_config=CLIPVisionConfig(**TOWER),
        text_config=LlamaConfig(**DECODER, num_key_value_heads=4),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_grid_pinpoints=PINPOINTS,
        image_seq_length=SIDE**2,
    )


class LlavaNextVideo(LlavaNext):
    shapes = (Shape("llava-next-video-7b", _next_video, (672, 672)),)
    small_shapes = ()
    tiny = (Case("llava_next_video", _tiny, CLIP, TilesAndFrames(CANVASES)),)

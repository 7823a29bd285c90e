"""Video-LLaVA-7B: CLIP-L/224 towers for images and videos, and Vicuna."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from transformers import CLIPVisionConfig, LlamaConfig, VideoLlavaConfig

from ....prune.tiling import Block, Tiling
from ..family import EvalFamily, Shape
from ..tiny_layouts import (
    DECODER,
    FRAMES,
    IMAGE,
    PIXELS,
    SIDE,
    TOWER,
    VIDEO,
    Plain,
    Row,
    images,
    noise,
)
from ..tiny_models import Case, tiny_shape
from .llava import Llava, clip, llama


class SquaresAndFrames(Plain):
    """Squares, and videos of squares with a CLS token ahead of each."""

    takes_videos = True

    def tiling(self, image: str, alone: bool) -> Tiling:
        if image in FRAMES:
            return Tiling((Block((SIDE,), (SIDE,), lead=1),) * FRAMES[image])
        return super().tiling(image, alone)

    def extra(self, rows: Sequence[Row], ids: torch.Tensor) -> dict[str, Any]:
        squares = [noise(n, 3, PIXELS, PIXELS) for n in images(rows) if n not in FRAMES]
        clips = [noise(n, FRAMES[n], 3, PIXELS, PIXELS) for n in images(rows) if n in FRAMES]
        given = {"pixel_values": squares, "pixel_values_videos": clips}
        return {name: torch.stack(pixels) for name, pixels in given.items() if pixels}


def _video_llava() -> VideoLlavaConfig:
    return VideoLlavaConfig(vision_config=clip(side=224), text_config=llama())


def _tiny() -> VideoLlavaConfig:
    return VideoLlavaConfig(
        vision_config=CLIPVisionConfig(**TOWER),
        text_config=LlamaConfig(**DECODER, num_key_value_heads=4),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
    )


class VideoLlava(EvalFamily):
    line = "LLaVA"
    wrapper = "video_llava"
    shapes: ClassVar[tuple[Shape, ...]] = (Shape("video-llava-7b", _video_llava, (224, 224)),)
    tiny: ClassVar[tuple[Case, ...]] = (
        Case(
            "video_llava",
            _tiny,
            tiny_shape(has_cls=True, prefix=1, blocks_read=4),
            SquaresAndFrames(),
        ),
    )
    usual_picture, pixels, smaller = Llava.usual_picture, Llava.pixels, Llava.smaller

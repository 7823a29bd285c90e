"""GLM-4.1V: patches packed in one row, frames of a video between times."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from transformers import Glm4vConfig

from ..family import EvalFamily, Shape
from ..tiny_layouts import (
    DECODER,
    FIRST_WORD,
    FRAMES,
    IMAGE,
    NONE,
    PATCH_GRIDS,
    VIDEO,
    VIDEO_END,
    VIDEO_START,
    VISION_END,
    VISION_START,
    Packed,
    Row,
)
from ..tiny_models import Case
from .qwen2_vl import MERGING, Qwen2VL

_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}


def _glm4v() -> Glm4vConfig:
    """GLM-4.1V-9B, whose sizes are the defaults."""
    rope = {**_ROPE, "mrope_section": [8, 12, 12]}
    return Glm4vConfig(text_config={"rope_parameters": rope})


class FramesAsImages(Packed):
    """Frames of a video have the placeholders of images, each with marks and its time behind, all
    between marks of their own; the model takes no images beside videos."""

    videos = ((3, "W", 2, "V", 4), (4, "V", 3), NONE)

    def placeholder(self, image: str) -> int:
        return IMAGE

    def framed(self, image: str, tokens: list[int]) -> list[int]:
        if image not in FRAMES:
            return super().framed(image, tokens)
        frames, framed = PATCH_GRIDS[image][0], [VIDEO_START]
        for frame in range(frames):
            part = tokens[: len(tokens) // frames]
            framed += [*super().framed(image, part), FIRST_WORD + frame]
        return [*framed, VIDEO_END]

    def extra(self, rows: Sequence[Row], ids: torch.Tensor) -> dict[str, Any]:
        in_video = (ids == VIDEO_START).cumsum(-1) > (ids == VIDEO_END).cumsum(-1)
        types = (ids == IMAGE).int() * (1 + in_video.int())
        return super().extra(rows, ids) | {"mm_token_type_ids": types}


def tiny_glm(config_class: Any) -> Any:
    """Half of each head is turned, as in the published ones."""
    vision = {"depth": 5, "num_heads": 4, "hidden_size": 48, "intermediate_size": 64}
    patches = {"patch_size": 4, "temporal_patch_size": 2, "spatial_merge_size": 2}
    rope = {**_ROPE, "mrope_section": [1, 1, 2]}
    return config_class(
        text_config={**DECODER, "num_key_value_heads": 2, "rope_parameters": rope},
        vision_config={
            **vision,
            **patches,
            "out_hidden_size": DECODER["hidden_size"],
            "image_size": 24,
        },
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        image_start_token_id=VISION_START,
        image_end_token_id=VISION_END,
        video_start_token_id=VIDEO_START,
        video_end_token_id=VIDEO_END,
    )


class Glm4V(Qwen2VL):
    line = "GLM"
    wrapper = "glm4v"
    scaling = None
    smaller = EvalFamily.smaller  # its processor's limits count the frames of a picture
    marks = ("image_start_token_id", "image_end_token_id")
    shapes: ClassVar[tuple[Shape, ...]] = (Shape("glm-4.1v-9b", _glm4v, (1008, 1008)),)
    tiny: ClassVar[tuple[Case, ...]] = (
        Case("glm4v", lambda: tiny_glm(Glm4vConfig), MERGING, FramesAsImages(), True),
    )

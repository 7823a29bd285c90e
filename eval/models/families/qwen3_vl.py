"""Qwen3-VL: larger patches, features for the first layers of the decoder; otherwise as Qwen2-VL."""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import Qwen3VLConfig

from ..family import Scaling, Shape
from ..tiny_layouts import DECODER, FIRST_WORD, FRAMES, PATCH_GRIDS, Packed
from ..tiny_models import Case
from .qwen2_vl import MERGING, TOKEN_IDS, Qwen2VL, tiny_config


def sized(
    config_class: Any = Qwen3VLConfig,
    *,
    width: int = 4096,
    mlp: int = 12288,
    layers: int = 36,
    heads: int = 32,
    key_heads: int = 8,
    depth: int = 27,
    **text: Any,
) -> Any:
    """Qwen3-VL-8B at its defaults; `text`: what else differs in the decoder."""
    vision = 1152 if depth == 27 else 576
    return config_class(
        text_config={
            "vocab_size": 151936,
            "hidden_size": width,
            "intermediate_size": mlp,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": key_heads,
            "head_dim": 128,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 5e6,
                "mrope_section": [24, 20, 20],
                "mrope_interleaved": True,
            },
            **text,
        },
        vision_config={
            "depth": depth,
            "hidden_size": vision,
            "intermediate_size": 4304 * vision // 1152,
            "num_heads": vision // 72,
            "out_hidden_size": width,
            "patch_size": 16,
            "spatial_merge_size": 2,
            "deepstack_visual_indexes": [8, 16, 24] if depth > 24 else [2, 5, 8],
        },
        **TOKEN_IDS,
    )


def _small() -> Any:
    return sized(width=1024, mlp=2752, layers=12, heads=8, key_heads=4, depth=12)


class Timestamped(Packed):
    """Every frame of a video is a run of its own behind a timestamp."""

    def framed(self, image: str, tokens: list[int]) -> list[int]:
        if image not in FRAMES:
            return super().framed(image, tokens)
        frames, framed = PATCH_GRIDS[image][0], []
        for frame in range(frames):
            part = tokens[: len(tokens) // frames]
            framed += [FIRST_WORD + frame, *super().framed(image, part)]
        return framed


def tiny(config_class: Any = Qwen3VLConfig, **text: Any) -> Any:
    """The tiny model; `text`: what differs in the decoder."""
    return tiny_config(
        config_class,
        {"head_dim": 16, **text},
        hidden_size=48,
        intermediate_size=64,
        out_hidden_size=DECODER["hidden_size"],
        num_position_embeddings=36,
        deepstack_visual_indexes=[1, 2, 3],
    )


class Qwen3VL(Qwen2VL):
    wrapper: ClassVar[str] = "qwen3_vl"
    scaling = Scaling(limits_fps=True, system_prompt=True, patch_size=16)
    shapes: ClassVar[tuple[Shape, ...]] = (Shape("qwen3-vl-8b", sized, (1024, 1024)),)
    small_shapes: ClassVar[tuple[Shape, ...]] = (Shape("qwen3-vl-small", _small, (768, 768)),)
    tiny: ClassVar[tuple[Case, ...]] = (
        Case("qwen3_vl", tiny, MERGING, Timestamped(), fixed_positions=True, checked=True),
    )

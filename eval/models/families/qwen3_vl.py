"""Qwen3-VL: larger patches, features for the first layers of the decoder; otherwise as Qwen2-VL."""

from __future__ import annotations

from transformers import Qwen3VLConfig

from ..family import Scaling, Shape
from .qwen2_vl import TOKEN_IDS, Qwen2VL


def _qwen3_vl(
    width: int = 4096, mlp: int = 12288, layers: int = 36, key_heads: int = 8, depth: int = 27
) -> Qwen3VLConfig:
    """Qwen3-VL-8B at its defaults."""
    vision = 1152 if width > 2048 else 576
    return Qwen3VLConfig(
        text_config={
            "vocab_size": 151936,
            "hidden_size": width,
            "intermediate_size": mlp,
            "num_hidden_layers": layers,
            "num_attention_heads": width // 128,
            "num_key_value_heads": key_heads,
            "head_dim": 128,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 5e6,
                "mrope_section": [24, 20, 20],
                "mrope_interleaved": True,
            },
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


class Qwen3VL(Qwen2VL):
    wrapper = "qwen3_vl"
    scaling = Scaling(limits_fps=True, system_prompt=True, patch_size=16)
    shapes = (Shape("qwen3-vl-8b", _qwen3_vl, (1024, 1024)),)
    small_shapes = (Shape("qwen3-vl-small", lambda: _qwen3_vl(1024, 2752, 12, 4, 12), (768, 768)),)

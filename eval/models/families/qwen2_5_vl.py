"""Qwen2.5-VL: windows in the encoder, sampled frames; otherwise as Qwen2-VL."""

from __future__ import annotations

from typing import Any

from transformers import Qwen2_5_VLConfig

from ..family import Scaling, Shape
from ..tiny_layouts import DECODER
from ..tiny_models import Case, tiny_shape
from .qwen2_vl import PACKED, TOKEN_IDS, Qwen2VL, tiny_config


def _qwen2_5_vl(
    width: int = 3584,
    mlp: int = 18944,
    layers: int = 28,
    key_heads: int = 4,
    depth: int = 32,
    vision: int = 1280,
) -> Qwen2_5_VLConfig:
    """Qwen2.5-VL-7B at its defaults; `depth` and `vision` are layers and width of the encoder."""
    return Qwen2_5_VLConfig(
        text_config={
            "vocab_size": 152064,
            "hidden_size": width,
            "intermediate_size": mlp,
            "num_hidden_layers": layers,
            "num_attention_heads": width // 128,
            "num_key_value_heads": key_heads,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e6,
                "mrope_section": [16, 24, 24],
            },
        },
        vision_config={
            "depth": depth,
            "hidden_size": vision,
            "intermediate_size": 3420 * vision // 1280,
            "num_heads": vision // 80,
            "out_hidden_size": width,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "window_size": 112,
            "fullatt_block_indexes": [depth * (i + 1) // 4 - 1 for i in range(4)],
        },
        **TOKEN_IDS,
    )


def _tiny() -> Any:
    return tiny_config(
        Qwen2_5_VLConfig,
        {},
        hidden_size=48,
        intermediate_size=64,
        out_hidden_size=DECODER["hidden_size"],
        window_size=16,
        fullatt_block_indexes=[1, 3],
        # With more, generate() (last position + 1) and forward (rope_deltas) number the first new
        # token differently after a video, also without a patch.
        tokens_per_second=1,
    )


WINDOWED = tiny_shape(has_cls=False, merge_unit=4, rotary=True, full_attention=(1, 3))


class Qwen2_5_VL(Qwen2VL):
    wrapper = "qwen2_5_vl"
    scaling = Scaling()
    shapes = (Shape("qwen2.5-vl-7b", _qwen2_5_vl, (1008, 1008)),)
    small_shapes = (
        Shape("qwen2.5-vl-small", lambda: _qwen2_5_vl(1024, 2752, 12, 4, 12, 640), (672, 672)),
        Shape("qwen2.5-vl-encoder", lambda: _qwen2_5_vl(1024, 2752, 2), (672, 672)),
    )
    tiny = (Case("qwen2_5_vl", _tiny, WINDOWED, PACKED, fixed_positions=True, checked=True),)

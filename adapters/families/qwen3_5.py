"""Qwen3.5: Qwen2-VL's encoder and M-RoPE; most decoder layers keep a state instead of attention."""

from __future__ import annotations

from ..layer_names import LayerNames
from .qwen2_vl import Qwen2VL


class Qwen35(Qwen2VL):
    name = "qwen3_5"
    layer_names = LayerNames(gated=True)

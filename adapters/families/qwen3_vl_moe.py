"""Qwen3-VL-MoE: Qwen3-VL with experts in the decoder."""

from __future__ import annotations

from .qwen3_vl import Qwen3VL


class Qwen3VLMoe(Qwen3VL):
    name = "qwen3_vl_moe"

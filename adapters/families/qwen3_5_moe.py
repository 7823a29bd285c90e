"""Qwen3.5-MoE: Qwen3.5 with experts in the decoder, one of them for all tokens."""

from __future__ import annotations

from .qwen3_5 import Qwen35


class Qwen35Moe(Qwen35):
    name = "qwen3_5_moe"

"""Qwen3-VL: Qwen2-VL whose first decoder layers get visual features of their own (deepstack)."""

from __future__ import annotations

from .qwen2_vl import Qwen2VL


class Qwen3VL(Qwen2VL):
    name = "qwen3_vl"

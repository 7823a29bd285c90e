"""What tests need of Qwen3.5: its tiny model, and its real processor."""

from __future__ import annotations

from families.qwen3_vl import MARKS as MARKS
from families.qwen3_vl import processor as processor

CASES = ("qwen3_5",)
ONE = None  # where one of a family is enough, Qwen3-VL asks all that it does

"""What tests need of ViP-LLaVA: its tiny model; its processor is LLaVA's."""

from __future__ import annotations

from families.llava import MARKS as MARKS
from families.llava import processor as processor

CASES = ("vipllava",)
ONE = "vipllava"

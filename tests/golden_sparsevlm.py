"""Golden runners of SparseVLM."""

from __future__ import annotations

from golden_kit import Runner

RUNNERS: dict[str, Runner] = {}

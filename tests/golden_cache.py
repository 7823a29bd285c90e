"""Golden runners of methods on the KV cache."""

from __future__ import annotations

from golden_kit import Runner

RUNNERS: dict[str, Runner] = {}

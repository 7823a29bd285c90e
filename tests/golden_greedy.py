"""Golden runners of methods that pick greedily."""

from __future__ import annotations

from golden_kit import Runner

RUNNERS: dict[str, Runner] = {}

"""Golden runners of methods that merge tokens."""

from __future__ import annotations

from golden_kit import Runner

RUNNERS: dict[str, Runner] = {}

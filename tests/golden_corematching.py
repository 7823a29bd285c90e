"""Golden runners of CoreMatching."""

from __future__ import annotations

from golden_kit import Runner

RUNNERS: dict[str, Runner] = {}

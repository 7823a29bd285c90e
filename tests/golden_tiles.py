"""Golden runners of methods that weigh tiles and chunks of the image."""

from __future__ import annotations

from golden_kit import Runner

RUNNERS: dict[str, Runner] = {}

"""Golden runners of methods with a schedule of cuts in the decoder."""

from __future__ import annotations

from golden_kit import Runner

RUNNERS: dict[str, Runner] = {}

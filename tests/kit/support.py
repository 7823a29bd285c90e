"""Which method runs on which model, as it is stored."""

from __future__ import annotations

import json

from kit.paths import TESTS

EXPECTED_FILE = TESTS / "data" / "support.json"
EXPECTED: dict[str, dict[str, str]] = json.loads(EXPECTED_FILE.read_text())
"""Method -> column -> how it works there, one of `WAYS`, or "no"."""

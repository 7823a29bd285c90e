"""Where things are in the checkout."""

import os
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
TESTS = ROOT / "tests"
GOLDEN = Path(os.environ.get("VLMPRUNE_GOLDEN") or TESTS / "golden")
STORED = ROOT / "eval" / "embedded" / "results"

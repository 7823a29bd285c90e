"""Tasks of lmms-eval that ship with the package, one folder each: what `--include_path` takes."""

from pathlib import Path

TASKS_DIR = Path(__file__).parent

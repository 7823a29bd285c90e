"""`vlmprune where`: folders and names that other programs need."""

from __future__ import annotations

from .. import embedded
from ..arguments.where import WhereRequest
from ..console import stdout
from ..embedded.vocabulary import KNOWN_WORDS
from ..tasks import TASKS_DIR


def run(request: WhereRequest) -> int:
    """The command. Returns the exit code."""
    found = {
        "model": embedded.MODEL_DIR,
        "data": embedded.DATA_DIR,
        "tasks": TASKS_DIR,
        "task-name": embedded.TASK,
        "words": " ".join(sorted(KNOWN_WORDS)),
    }
    stdout().print(str(found[request.what]), markup=False)
    return 0

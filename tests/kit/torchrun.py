"""Several processes on the CPU."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

WORLD = 2


def torchrun(*arguments: object, folder: Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc_per_node", str(WORLD), *map(str, arguments)),
        ],
        capture_output=True,
        text=True,
        cwd=folder,
        timeout=600,
    )

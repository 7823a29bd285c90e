"""Peak memory on the CPU, where no allocator keeps account: in a fresh process, from the kernel."""

from __future__ import annotations

import gc
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from ...prune.errors import VlmpruneError

_CHILD = "from vlmprune.eval.measure.memory import child; child()"
# Blocks from this size on go back to the kernel as soon as they are freed (glibc), so that the
# resident set follows what is in use.
_ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536"}


class MemoryMeasureError(VlmpruneError, RuntimeError):
    """Peak memory that could not be measured.

    Symptom: `bench model --memory` stops.
    Cause: the process that measures was killed, or the system does not tell peaks.
    Type: a smaller `--shape`, or leave `--memory` out.
    Page: ERRORS.md#memorymeasureerror
    """


def in_fresh_process(measure: Callable[..., int], *args: object) -> int:
    """`measure(*args)` in a new Python process; function and arguments are pickled.

    Raises:
        MemoryMeasureError: the process failed, or was killed.
    """
    done = subprocess.run(
        [sys.executable, "-P", "-c", _CHILD],
        input=pickle.dumps((measure, args)),
        env=os.environ | _ALLOCATOR,
        capture_output=True,
        check=False,
    )
    if done.returncode:
        lines = done.stderr.decode(errors="replace").split("\n")
        why = next((line for line in reversed(lines) if line.strip()), "no message")
        raise MemoryMeasureError(
            f"The process that measures peak memory ended with {done.returncode} ({why.strip()}): "
            f"choose a smaller model, or leave --memory out."
        )
    return int(done.stdout.split()[-1])


def child() -> None:
    """What the new process runs: the answer is the last word on stdout."""
    measure, args = pickle.load(sys.stdin.buffer)
    sys.stdout.write(f"\n{measure(*args)}\n")


def added_at_peak(run: Callable[[], object]) -> int:
    """Bytes that `run` adds, at its peak, to what this process holds before.

    Where the kernel can forget earlier peaks (Linux), a first run warms up and is not counted.
    """
    if _forget_peak():
        run()
        gc.collect()
        _forget_peak()
    before = _peak()
    run()
    return max(0, _peak() - before)  # Linux counts pages in batches, up to a few too few


def free_memory(device: str) -> int | None:
    """Bytes that can still be allocated on a device; None where nothing tells."""
    import torch

    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        text = Path("/proc/meminfo").read_text(encoding="ascii")
        return next(int(line.split()[1]) for line in text.splitlines() if "MemAvail" in line) << 10
    except (OSError, StopIteration):
        return None


def _forget_peak() -> bool:
    """Set the largest resident set to the present one."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def _peak() -> int:
    """The largest resident set, in bytes."""
    try:
        # Not ru_maxrss, which on Linux starts with that of the process that started this one.
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
        return next(int(line.split()[1]) for line in status.splitlines() if "VmHWM" in line) << 10
    except (OSError, StopIteration):
        pass
    try:
        import resource
    except ImportError:
        raise MemoryMeasureError(
            "This system does not tell a process its peak memory: leave --memory out."
        ) from None
    unit = 1 if sys.platform == "darwin" else 1 << 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

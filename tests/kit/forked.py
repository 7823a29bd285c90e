"""Processes that are copies of this one: they begin at once, where a new Python spends seconds on
importing torch and transformers."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import torch

SECONDS = 300
"""After which a process that others wait for is ended."""


def forked(work: Callable[[], object], said: Path | None = None) -> int:
    """Fork a process that does it, and ends with its answer as the exit code; None is 0. It
    computes with one thread, as those of torch are not forked with it.

    Args:
        said: the file that gets what it prints, errors too; without, it prints as this one does.

    Returns:
        the number of the process.
    """
    child = os.fork()
    if child:
        return child
    _work(work, said)


def _work(work: Callable[[], object], said: Path | None) -> NoReturn:
    code = 1
    try:
        torch.set_num_threads(1)
        if said is not None:
            sys.stdout = sys.stderr = said.open("w", buffering=1)
        code = int(work() or 0)  # type: ignore[call-overload]
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def exit_code(child: int) -> int:
    """That of a forked process, which is waited for; of one that a signal ended, minus the
    signal's number."""
    deadline = time.monotonic() + SECONDS
    while not (found := os.waitpid(child, os.WNOHANG))[0]:
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.01)
    return os.waitstatus_to_exitcode(found[1])


def together(work: Callable[[], object], world: int, folder: Path) -> tuple[list[int], list[str]]:
    """Exit codes, and what was printed, of processes that do it with the variables of the
    environment that torchrun gives to those that it starts."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    shared |= {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}

    def one(rank: int) -> Callable[[], object]:
        def run() -> object:
            from accelerate import PartialState

            PartialState._reset_state()  # whatever this process found of itself as the only one
            os.environ.update(shared, RANK=str(rank), LOCAL_RANK=str(rank))
            return work()

        return run

    files = [folder / f"said-{rank}.txt" for rank in range(world)]
    children = [forked(one(rank), file) for rank, file in enumerate(files)]
    return [exit_code(child) for child in children], [file.read_text() for file in files]

"""What keeps lmms-eval from what it does to a process: bars, seeds, printing, retried errors."""

from __future__ import annotations

import contextlib
import os
import random
import sys
from collections.abc import Iterator
from typing import Any

import torch


def cause_of(error: Exception) -> Exception:
    """What was behind it when lmms-eval gave up trying again."""
    from tenacity import RetryError

    if isinstance(error, RetryError):
        cause = error.last_attempt.exception()
        if isinstance(cause, Exception):
            return cause
    return error


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """lmms-eval reads from the environment which process of how many it is: the only one."""
    said = {name: os.environ.pop(name, None) for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK")}
    try:
        yield
    finally:
        os.environ.update({name: value for name, value in said.items() if value is not None})


@contextlib.contextmanager
def seeds_kept() -> Iterator[None]:
    """lmms-eval sets the seeds of the process: the caller gets its own back."""
    import numpy as np

    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


@contextlib.contextmanager
def quiet_bars() -> Iterator[None]:
    """Without lmms-eval's bars: the sweep has its own."""
    import lmms_eval.api.task as building
    import lmms_eval.evaluator as evaluating

    modules: list[Any] = [building, evaluating]
    bars = [module.tqdm for module in modules]

    def silent(*args: Any, **options: Any) -> Any:
        return bars[0](*args, **(options | {"disable": True}))

    try:
        for module in modules:
            module.tqdm = silent
        yield
    finally:
        for module, bar in zip(modules, bars, strict=True):
            module.tqdm = bar


@contextlib.contextmanager
def data_bars() -> Iterator[None]:
    """Bars of data sets only on a terminal."""
    import datasets

    change = not sys.stderr.isatty() and not datasets.are_progress_bars_disabled()
    if change:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        if change:
            datasets.enable_progress_bars()


@contextlib.contextmanager
def to_stderr() -> Iterator[None]:
    """Warnings of lmms-eval go to stderr, as its logger takes what is stdout when it is imported:
    there, only results are printed."""
    with contextlib.redirect_stdout(sys.stderr):
        yield

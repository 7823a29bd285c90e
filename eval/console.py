"""The one place that writes to the terminal: results to stdout, everything else to stderr."""

from __future__ import annotations

import logging
import sys

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


def stdout() -> Console:
    return Console(highlight=False, soft_wrap=True)


def stderr() -> Console:
    return Console(stderr=True, highlight=False)


def progress(*, shown: bool = True) -> Progress:
    """A bar on stderr; silent where stderr is not a terminal, or not `shown`."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=stderr(),
        disable=not (shown and sys.stderr.isatty()),
        transient=True,
    )


def set_up_logging(verbosity: str) -> None:
    """Our log lines on stderr; the libraries below us only speak up at DEBUG."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    logger = logging.getLogger("vlmprune")
    logger.handlers[:] = [handler]
    logger.propagate = False
    logger.setLevel(verbosity)


def quiet_transformers(verbosity: str) -> None:
    from transformers.utils import logging as theirs

    if verbosity != "DEBUG":
        theirs.set_verbosity_error()
        theirs.disable_progress_bar()

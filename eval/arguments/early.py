"""What can be refused before torch is imported: methods, budgets, tasks and kinds that nobody has,
and a folder that takes nothing."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path

from ...prune.amount import PUBLISHED, Budget
from ...prune.errors import UnknownMethodError, VlmpruneError, did_you_mean
from ...prune.plugins import ENTRY_POINT_GROUP
from ...prune.shipped import ELSEWHERE, PACKAGE, shipped
from ..embedded import EMBEDDED, TASK, WHERE_MODEL, WHERE_TASK
from ..embedded.turns import TURNS
from ..embedded.vocabulary import KINDS
from ..tasks.protocols import TaskError
from ..words.typed import DENSE, method_names_in

SHIPPED_TASKS = (TASK, TURNS, WHERE_TASK)
"""Tasks that ship with the package."""


class OutputError(VlmpruneError, OSError):
    """A folder that results cannot be written to.

    Symptom: a sweep or bench stops before torch is imported.
    Cause: the folder is a file, read-only, or on a full disk.
    Type: `--output_path` with another folder.
    Page: ERRORS.md#outputerror
    """


def refuse_unknown_methods(words: Iterable[str], *, others: Sequence[str] = ()) -> None:
    """Look at the names alone in words such as "divprune@0.5+fastv:layer=3".

    Args:
        others: names that are no methods, and that the command takes all the same.

    Raises:
        UnknownMethodError: it says what is near, and what there is.
    """
    names = [name for word in words for name in method_names_in(word)]
    if not names:
        return
    known = [*_known(), *others]
    for name in names:
        if name in ELSEWHERE and name not in others:
            raise UnknownMethodError(f"{name} is no method: it {ELSEWHERE[name]}")
        if name not in known and name != DENSE:
            raise UnknownMethodError(f"Unknown method {name!r}. {did_you_mean(name, known)}")


def refuse_unknown_budgets(words: Iterable[str]) -> None:
    """Look at budgets as typed, alone or behind a method.

    Raises:
        BudgetError: it says what to write.
    """
    for word in words:
        if word != PUBLISHED:
            Budget.parse(word)


def refuse_unknown_questions(
    tasks: Sequence[str], kinds: Iterable[str], *, model: str, other_tasks: bool
) -> None:
    """Look at names of tasks, where lmms-eval is not there to know more, and of kinds.

    Args:
        model: the name of the model that is asked.
        other_tasks: whether there are tasks beside these, which may have kinds of their own.

    Raises:
        TaskError: it says what is near, or what to install.
    """
    for name in tasks:
        near = get_close_matches(name, SHIPPED_TASKS)
        if name in SHIPPED_TASKS or (not near and find_spec("lmms_eval") is not None):
            continue
        raise TaskError(
            f"Unknown task {name!r}.{f' Did you mean: {near[0]}?' if near else ''} Tasks other "
            f"than {', '.join(SHIPPED_TASKS)} are those of lmms-eval (pip install "
            f"'vlmprune[lmms]'; `lmms-eval --tasks list` lists them) and your own (--data FILE)."
        )
    if WHERE_TASK in tasks and model == EMBEDDED:
        raise TaskError(
            f"{WHERE_TASK} asks with the word 'where', which the model {model} does not know: type "
            f"--model {WHERE_MODEL}."
        )
    if other_tasks or (tasks and TASK not in tasks):
        return
    for kind in kinds:
        if kind not in KINDS:
            raise TaskError(
                f"{TASK} has no questions of kind {kind!r}. {did_you_mean(kind, KINDS)}"
            )


def refuse_unwritable(folder: str) -> None:
    """Look at a folder for results, or at the nearest one above it that is there.

    Raises:
        OutputError: nothing can be written there.
    """
    there = next(path for path in (Path(folder), *Path(folder).absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        why = "Permission denied" if there.is_dir() else f"{there} is a file"
        raise OutputError(
            f"Results cannot be written to {folder} ({why}): choose another folder with "
            f"--output_path."
        )


def _known() -> list[str]:
    """As `registry.method_names`, which also has those that were registered in this process."""
    registry = sys.modules.get(f"{PACKAGE.rpartition('.')[0]}.registry")
    if registry is not None:
        found: list[str] = registry.method_names()
        return found
    return sorted({*shipped(), *entry_points(group=ENTRY_POINT_GROUP).names})

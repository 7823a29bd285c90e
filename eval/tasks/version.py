"""The version of a task: two tasks of one name are the same only if their contents are."""

from __future__ import annotations

from collections.abc import Sequence

from ..content_hash import content_hash, plain_fields
from ..sources import UNKNOWN, Source
from .protocols import Question, Task

_ASKED = ("id", "kind", "question", "answer", "image")


def version_of(task: Task, questions: Sequence[Question]) -> str:
    """The task's version, and for tasks that are not shipped a hash of what is asked and how: the
    questions with their pictures, the task's public fields, its code."""
    source = Source(type(task)).hash
    if source is None:
        return task.version
    if source == UNKNOWN:
        return f"{task.version}-{UNKNOWN}"
    return f"{task.version}-{content_hash(source, plain_fields(task), questions_hash(questions))}"


def questions_hash(questions: Sequence[Question]) -> str:
    """`content_hash` of questions: what `Question` has, pictures included, and all further public
    fields of plain values, e.g. several answers."""
    return content_hash(*(content_hash(*_parts(question)) for question in questions))


def _parts(question: Question) -> tuple[object, ...]:
    asked = [getattr(question, name) for name in _ASKED]
    more = {k: v for k, v in plain_fields(question).items() if k not in _ASKED}
    return (*asked, more)

"""Questions of a task: which are asked, how they are put to a model, how answers are compared."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from itertools import chain, zip_longest
from typing import Any

from ...prune.errors import did_you_mean
from .protocols import AnyQuestion, Question, Task, TaskError


def chat_prompt(processor: Any, text: str) -> str:
    """A question behind the image's placeholder, in the model's own chat template.

    Raises:
        TaskError: the processor has no template.
    """
    if not getattr(processor, "chat_template", None):
        raise TaskError(
            f"{type(processor).__name__} has no chat template to put the question into: load "
            f"the processor of a chat model, or set processor.chat_template."
        )
    content = [{"type": "image"}, {"type": "text", "text": text}]
    message = [{"role": "user", "content": content}]
    return processor.apply_chat_template(message, add_generation_prompt=True)


def asked(task: Task, limit: int | None, kinds: Sequence[str] | None) -> Sequence[Question]:
    """The first `limit` questions of a task, or of some of its kinds, which then take turns.

    Raises:
        TaskError: the task has no questions of a kind.
    """
    if not kinds:
        return task.questions(limit)
    by_kind: dict[str, list[Question]] = {}
    for question in task.questions(None):
        by_kind.setdefault(question.kind, []).append(question)
    for kind in kinds:
        if kind not in by_kind:
            hint = did_you_mean(kind, sorted(by_kind))
            raise TaskError(f"{task.name} has no questions of kind {kind!r}. {hint}")
    return in_turns(question for kind in set(kinds) for question in by_kind[kind])[:limit]


def in_turns(questions: Iterable[AnyQuestion]) -> list[AnyQuestion]:
    """The questions with their kinds taking turns, so that the first few have them all."""
    by_kind: dict[str, list[AnyQuestion]] = {}
    for question in questions:
        by_kind.setdefault(question.kind, []).append(question)
    turns = zip_longest(*(by_kind[kind] for kind in sorted(by_kind)))
    return [question for question in chain.from_iterable(turns) if question is not None]


def normalise(text: str) -> str:
    """Lower case, no punctuation, single spaces: what larger models add around a short answer."""
    return " ".join(re.sub(r"[^\w\s]", " ", text.lower()).split())

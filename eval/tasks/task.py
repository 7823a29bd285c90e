"""What a benchmark must offer to be swept, and the benchmark that ships with the package."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from itertools import chain, zip_longest
from typing import Any, Protocol, TypeVar

from PIL.Image import Image

from ...prune.errors import VlmpruneError, did_you_mean
from ..fingerprint import content_hash, plain_fields, questions_hash
from ..sources import UNKNOWN, Source


class TaskError(VlmpruneError, ValueError):
    """Questions that a task does not have."""


class Question(Protocol):
    """One question about one image. Scores are reported over all, and for every `kind`."""

    @property
    def id(self) -> str | int: ...
    @property
    def kind(self) -> str: ...
    @property
    def question(self) -> str: ...
    @property
    def answer(self) -> str: ...
    @property
    def image(self) -> Image: ...


AnyQuestion = TypeVar("AnyQuestion", bound=Question)


class Task(Protocol):
    """A benchmark. The same `limit` gives the same questions in the same order.

    Results tell tasks of one name apart by what they ask and how; see `version_of`.
    """

    @property
    def name(self) -> str: ...
    @property
    def version(self) -> str: ...
    @property
    def max_new_tokens(self) -> int: ...

    def questions(self, limit: int | None) -> Sequence[Question]:
        """`limit` questions, every kind represented (None: all)."""
        ...

    def prompt(self, processor: Any, question: Question) -> str:
        """The text that goes to the processor, image placeholder included."""
        ...

    def is_correct(self, prediction: str, question: Question) -> bool: ...


class EmbeddedTask:
    """The benchmark in `eval/embedded`; any model answers it through its own chat template."""

    max_new_tokens = 8

    def __init__(self) -> None:
        from .. import embedded

        self._embedded = embedded
        self.name: str = embedded.TASK
        self.version = str(embedded.TASK_VERSION)

    def questions(self, limit: int | None) -> Sequence[Question]:
        return self._embedded.questions(limit)

    def prompt(self, processor: Any, question: Question) -> str:
        return self._embedded.prompt(processor, question.question)

    def is_correct(self, prediction: str, question: Question) -> bool:
        return self._embedded.is_correct(normalise(prediction), question.answer)


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


def version_of(task: Task, questions: Sequence[Question]) -> str:
    """The task's version, and for tasks that are not shipped a hash of what is asked and how: the
    questions with their pictures, the task's public fields, its code."""
    source = Source(type(task)).hash
    if source is None:
        return task.version
    if source == UNKNOWN:
        return f"{task.version}-{UNKNOWN}"
    return f"{task.version}-{content_hash(source, plain_fields(task), questions_hash(questions))}"


def normalise(text: str) -> str:
    """Lower case, no punctuation, single spaces: what larger models add around a short answer."""
    return " ".join(re.sub(r"[^\w\s]", " ", text.lower()).split())

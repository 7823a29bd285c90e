"""The embedded benchmarks as tasks; any model answers them through its own chat template."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..tasks.protocols import Question, Task, TaskError
from ..tasks.questions import normalise
from ..vocabulary_note import unknown_words
from . import TASK, TASK_VERSION, WHERE_MODEL, WHERE_TASK, is_correct, prompt, questions


class EmbeddedTask:
    """Questions about drawn scenes, whose answers are one word or a few."""

    max_new_tokens = 8

    def __init__(self) -> None:
        self.name: str = TASK
        self.version = TASK_VERSION

    def questions(self, limit: int | None) -> Sequence[Question]:
        return questions(limit)

    def prompt(self, processor: Any, question: Question) -> str:
        return prompt(processor, question.question)

    def is_correct(self, prediction: str, question: Question) -> bool:
        return is_correct(normalise(prediction), question.answer)


class WhereTask(EmbeddedTask):
    """Questions about the cell of a 3 x 3 grid in which something is."""

    def __init__(self) -> None:
        self.name = WHERE_TASK
        self.version = "1"

    def questions(self, limit: int | None) -> Sequence[Question]:
        from .where import where_questions

        return where_questions(limit)

    def prompt(self, processor: Any, question: Question) -> str:
        """The text that goes to the processor.

        Raises:
            TaskError: the model has a closed vocabulary without one of the words.
        """
        if words := unknown_words(processor, [question.question]):
            raise TaskError(
                f"{self.name} asks {question.question!r}, and the model does not know "
                f"{', '.join(map(repr, words))}: take --model {WHERE_MODEL}, which learned it."
            )
        return super().prompt(processor, question)


def shipped_tasks() -> dict[str, Task]:
    """The tasks of single questions that ship with the package, by name."""
    return {task.name: task for task in (EmbeddedTask(), WhereTask())}

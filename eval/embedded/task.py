"""The embedded benchmark as a task; any model answers it through its own chat template."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..tasks.protocols import Question
from ..tasks.questions import normalise
from . import TASK, TASK_VERSION, is_correct, prompt, questions


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

"""What a benchmark must offer to be swept: questions, and how they are put and judged."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from ...prune.errors import VlmpruneError

if TYPE_CHECKING:
    from PIL.Image import Image


class TaskError(VlmpruneError, ValueError):
    """Questions that a task does not have.

    Symptom: a sweep stops before it loads a model, or a question cannot be put.
    Cause: a task or kind that is misspelt or belongs to lmms-eval, a processor without a chat
        template, or a task with a word that the model does not know.
    Type: `vlmprune sweep --help` for tasks and kinds; `pip install 'vlmprune[lmms]'` for others;
        `--model embedded-where` for tinyscenes-where.
    Page: ERRORS.md#taskerror
    """


class Question(Protocol):
    """One question about one image. Scores are reported over all, and for every `kind`.

    One that knows which part of the picture its answer needs says so by `evidence`, a sequence of
    points of a raster of 14 x 14 over the picture, in reading order: it is measured how many of
    them a method keeps.
    """

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

    Results tell tasks of one name apart by what they ask and how; see `version.version_of`.
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

"""Two questions about one picture, in both orders, whose answers need different objects."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from . import TASK, Question, questions

TURNS = f"{TASK}-turns"
VERSION = "1"
SECOND, FIRST = "second_turn", "first_turn"
"""The metrics: the same questions, asked behind another one and asked first, in the same order."""


@dataclass(frozen=True)
class Turns:
    """One question after another about the same picture. What is asked second counts."""

    first: Question
    second: Question

    @property
    def id(self) -> str:
        return f"{self.first.id}-{self.second.id}"

    @property
    def kind(self) -> str:
        return self.second.kind


def turns(limit: int | None = None) -> list[Turns]:
    """Every couple in both orders, one behind the other, so that each question comes first once and
    second once; `limit` takes a prefix of whole couples."""
    found = [Turns(*pair) for couple in _couples() for pair in (couple, couple[::-1])]
    return found if limit is None else found[: max(2, limit - limit % 2)]


@lru_cache
def _couples() -> list[tuple[Question, Question]]:
    """Questions of one picture that share no patch of evidence, each question once at most."""
    by_image: dict[int, list[Question]] = {}
    for question in questions():
        if question.evidence:  # a "no" has none
            by_image.setdefault(question.image_id, []).append(question)
    return [couple for asked in by_image.values() for couple in _matched(asked)]


def _matched(asked: Sequence[Question]) -> list[tuple[Question, Question]]:
    """Each with the first of the later ones that fits and is free."""
    left, found = list(asked), []
    while left:
        one = left.pop(0)
        other = next((q for q in left if not {*one.evidence} & {*q.evidence}), None)
        if other is not None:
            left.remove(other)
            found.append((one, other))
    return found
